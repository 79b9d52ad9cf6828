"""Weights of Llama-family models under our names: a table, and every tensor accounted for.

Theirs are the names of transformers' ``LlamaForCausalLM``; ours are those of Megatron's local
modules, as they are on disk. HybridModel counts two layers a block: attention, then the MLP.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unimoe_mcore.checkpoints.deferred import Deferred
from unimoe_mcore.config.errors import UserError
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
        theirs: their names; ``{block}`` is the block's number.
        shapes: shape of each of theirs, in terms of the model's sizes.
        combine: makes ours of theirs.
    """

    ours: str
    theirs: tuple[str, ...]
    shapes: tuple[tuple[str, ...], ...]
    combine: Combine = _same


_MATRIX, _NORM = ("vocabulary", "hidden"), ("hidden",)
_THERE, _ATTENTION, _MLP = (
    "model.layers.{block}.",
    "decoder.layers.{attention}.",
    "decoder.layers.{mlp}.",
)

WHOLE = (
    Rule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), (_MATRIX,)),
    Rule("decoder.final_norm.weight", ("model.norm.weight",), (_NORM,)),
)
HEAD = Rule("output_layer.weight", ("lm_head.weight",), (_MATRIX,))
BLOCK = (
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
    Rule(
        _MLP + "mlp.linear_fc1.weight",
        (_THERE + "mlp.gate_proj.weight", _THERE + "mlp.up_proj.weight"),
        (("ffn", "hidden"), ("ffn", "hidden")),
        _stacked,
    ),
    Rule(_MLP + "mlp.linear_fc2.weight", (_THERE + "mlp.down_proj.weight",), (("hidden", "ffn"),)),
)

ROPE_FACTORS = "rope_freqs.weight"
"""llama.cpp's factors of the rotary frequencies, ``[half a head]``: where they are not 1, as those
of Llama 3.1, positions are scaled."""
UNSCALED = "all its factors are 1"

MOST_NAMED = 12
"""Tensors that one message names."""


@dataclass(frozen=True)
class Imported:
    """A language model under our names.

    Attributes:
        tensors: our name on disk -> values, made of theirs when they are read.
        used: their name -> our name.
        skipped: their name -> why it was not taken.
    """

    tensors: dict[str, Deferred]
    used: dict[str, str]
    skipped: dict[str, str]


def import_llama(theirs: Mapping[str, Deferred], language: LanguageConfig, source: str) -> Imported:
    """Lay a Llama's weights out as ours; of their values only the rotary factors are looked at.

    Args:
        theirs: their name -> values.
        language: shape of the model.
        source: where they come from, for messages.

    Raises:
        UserError: naming the tensors that are missing, have another shape, or are not known.
    """
    rules = list(_rules(language))
    problems = [p for rule in rules for p in _problems(rule, theirs, language)]
    used = {name: f"language_model.{rule.ours}" for rule in rules for name in rule.theirs}
    skipped = {}
    for name in sorted(theirs.keys() - used.keys()):
        if name != ROPE_FACTORS:
            problems.append(f"{name} is not known")
        elif not _neutral(theirs[name], language):
            problems.append(f"{name} scales the rotary positions, which is not known here")
        else:
            skipped[name] = UNSCALED
    if problems:
        raise UserError(f"{source} cannot be used: {some(problems)}.")
    tensors = {
        f"language_model.{rule.ours}": _combined(rule, [theirs[n] for n in rule.theirs], language)
        for rule in rules
    }
    return Imported(tensors, used, skipped)


def some(problems: Sequence[str]) -> str:
    """Problems in one sentence: the first ones, and how many there are more."""
    more = len(problems) - MOST_NAMED
    return "; ".join(problems[:MOST_NAMED]) + (f"; and {more} more" if more > 0 else "")


def _combined(rule: Rule, parts: Sequence[Deferred], language: LanguageConfig) -> Deferred:
    """One of ours; every rule lays the rows of theirs one below another."""
    shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
    return Deferred(shape, lambda: rule.combine([part.read() for part in parts], language))


def _neutral(factors: Deferred, language: LanguageConfig) -> bool:
    half = language.hidden // language.heads // 2
    return factors.shape == (half,) and bool((factors.read() == 1).all())


def _rules(language: LanguageConfig) -> list[Rule]:
    """The table with every block's numbers filled in."""
    rules = list(WHOLE if language.tied else (*WHOLE, HEAD))
    for block in range(language.blocks):
        numbers = {"block": block, "attention": 2 * block, "mlp": 2 * block + 1}
        for rule in BLOCK:
            theirs = tuple(name.format(**numbers) for name in rule.theirs)
            rules.append(Rule(rule.ours.format(**numbers), theirs, rule.shapes, rule.combine))
    return rules


def _problems(rule: Rule, theirs: Mapping[str, Deferred], language: LanguageConfig) -> list[str]:
    head = language.hidden // language.heads
    sizes = {**vars(language), "queries": language.heads * head, "keys": language.kv_heads * head}
    problems = []
    for name, axes in zip(rule.theirs, rule.shapes, strict=True):
        wanted = [sizes[axis] for axis in axes]
        if name not in theirs:
            problems.append(f"{name} is missing")
        elif list(theirs[name].shape) != wanted:
            problems.append(f"{name} is {list(theirs[name].shape)}, not {wanted}")
    return problems
