"""Weights of Llama-family models under our names, as a table.

Theirs are the names of transformers' ``LlamaForCausalLM``; ours are those of Megatron's local
modules, as they are on disk. HybridModel counts two layers a block: attention, then the MLP.
``unimoe_mcore.checkpoints.importing`` lays weights out by these tables.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from unimoe_mcore.config.model import LanguageConfig

type Combine = Callable[[Sequence[Tensor], LanguageConfig], Tensor]


def _same(parts: Sequence[Tensor], language: LanguageConfig) -> Tensor:
    return parts[0]


def _stacked(parts: Sequence[Tensor], language: LanguageConfig) -> Tensor:
    """Gate above up, ``[2 * ffn, hidden]``."""
    return torch.cat(list(parts))


def _by_group(parts: Sequence[Tensor], language: LanguageConfig) -> Tensor:
    """For every key/value group its query heads, its key and its value, ``[rows, hidden]``."""
    groups = zip(*(part.chunk(language.kv_heads) for part in parts), strict=True)
    return torch.cat([torch.cat(group) for group in groups])


@dataclass(frozen=True)
class Rule:
    """One of our tensors: which of theirs it is made of, of which shape, and how.

    Attributes:
        ours: its name without ``language_model.``; ``{attention}`` and ``{mlp}`` are the numbers
            of a block's two layers.
        theirs: their names; ``{block}`` is the block's number, ``{expert}`` an expert's.
        shapes: shape of each of theirs, in terms of the model's sizes (``sizes_of``).
        combine: makes ours of theirs; it lays their rows one below another.
        rows: the size that ours has rows for, where that may be more than theirs have: rows of
            zeros fill it up.
    """

    ours: str
    theirs: tuple[str, ...]
    shapes: tuple[tuple[str, ...], ...]
    combine: Combine = _same
    rows: str = ""

    def of(self, **numbers: int) -> Rule:
        """The rule with the numbers in its names filled in."""
        theirs = tuple(name.format(**numbers) for name in self.theirs)
        return replace(self, ours=self.ours.format(**numbers), theirs=theirs)


_MATRIX, _NORM = ("words", "hidden"), ("hidden",)
_THERE, _ATTENTION, _MLP = (
    "model.layers.{block}.",
    "decoder.layers.{attention}.",
    "decoder.layers.{mlp}.",
)

EMBEDDING = "model.embed_tokens.weight"
OUTPUT = "lm_head.weight"
WHOLE = (
    Rule("embedding.word_embeddings.weight", (EMBEDDING,), (_MATRIX,), rows="vocabulary"),
    Rule("decoder.final_norm.weight", ("model.norm.weight",), (_NORM,)),
)
HEAD = Rule("output_layer.weight", (OUTPUT,), (_MATRIX,), rows="vocabulary")
ATTENTION = (
    Rule(_ATTENTION + "input_layernorm.weight", (_THERE + "input_layernorm.weight",), (_NORM,)),
    Rule(
        _ATTENTION + "self_attention.linear_qkv.weight",
        tuple(f"{_THERE}self_attn.{each}_proj.weight" for each in "qkv"),
        (("queries", "hidden"), ("keys", "hidden"), ("keys", "hidden")),
        _by_group,
    ),
    Rule(
        _ATTENTION + "self_attention.linear_proj.weight",
        (_THERE + "self_attn.o_proj.weight",),
        (("hidden", "queries"),),
    ),
    Rule(
        _MLP + "pre_mlp_layernorm.weight", (_THERE + "post_attention_layernorm.weight",), (_NORM,)
    ),
)
"""Of a block: all but its MLP."""
DENSE = (
    Rule(
        _MLP + "mlp.linear_fc1.weight",
        (_THERE + "mlp.gate_proj.weight", _THERE + "mlp.up_proj.weight"),
        (("ffn", "hidden"), ("ffn", "hidden")),
        _stacked,
    ),
    Rule(_MLP + "mlp.linear_fc2.weight", (_THERE + "mlp.down_proj.weight",), (("hidden", "ffn"),)),
)
BLOCK = (*ATTENTION, *DENSE)
EXPERT = (
    Rule(
        _MLP + "mlp.linear_fc1.weight",
        (
            _THERE + "block_sparse_moe.experts.{expert}.w1.weight",
            _THERE + "block_sparse_moe.experts.{expert}.w3.weight",
        ),
        (("ffn", "hidden"), ("ffn", "hidden")),
        _stacked,
    ),
    Rule(
        _MLP + "mlp.linear_fc2.weight",
        (_THERE + "block_sparse_moe.experts.{expert}.w2.weight",),
        (("hidden", "ffn"),),
    ),
)
"""Of a block of Mixtral: one expert, in the form of a dense MLP; what an expert artefact holds."""
ROUTER = (
    Rule(
        _MLP + "mlp.router.weight",
        (_THERE + "block_sparse_moe.gate.weight",),
        (("experts", "hidden"),),
    ),
)


def of_blocks(rules: Sequence[Rule], language: LanguageConfig, **numbers: int) -> list[Rule]:
    """A block's rules for every block."""
    return [
        rule.of(block=block, attention=2 * block, mlp=2 * block + 1, **numbers)
        for block in range(language.blocks)
        for rule in rules
    ]


def rules_of(language: LanguageConfig, mlp: Sequence[Rule] = DENSE, **numbers: int) -> list[Rule]:
    """The whole language model's rules.

    Args:
        mlp: those of a block's MLP.
        numbers: more numbers in their names.
    """
    whole = list(WHOLE if language.tied else (*WHOLE, HEAD))
    return whole + of_blocks((*ATTENTION, *mlp), language, **numbers)


def sizes_of(language: LanguageConfig) -> dict[str, int]:
    """What the tables' axes are called -> sizes."""
    head = language.hidden // language.heads
    return {
        **vars(language),
        "words": language.words,
        "queries": language.heads * head,
        "keys": language.kv_heads * head,
    }
