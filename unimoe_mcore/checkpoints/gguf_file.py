"""Published language models in one GGUF file: weights, shape and tokenizer.

GGUF is the format of llama.cpp. Its weights are mostly in 4 to 8 bits; here they are multiplied out
again, which does not bring back what the rounding took.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data_pipeline.conversation.published import with_markers
from data_pipeline.shards.integrity import file_sha256
from unimoe_mcore.checkpoints.deferred import Deferred
from unimoe_mcore.checkpoints.facts import Facts, listed, number, positive, shown, size, text
from unimoe_mcore.checkpoints.gguf_header import (
    Header,
    StoredTensor,
    check_kinds,
    read_header,
    read_values,
)
from unimoe_mcore.checkpoints.gguf_tokenizer import read_tokenizer
from unimoe_mcore.checkpoints.importing import ROPE_FACTORS, some
from unimoe_mcore.checkpoints.llama import rules_of
from unimoe_mcore.checkpoints.published import Published
from unimoe_mcore.config.errors import UserError
from unimoe_mcore.config.model import LanguageConfig

_BLOCK = r"blk\.(0|[1-9][0-9]*)\."
NAMES = {
    r"token_embd\.weight": "model.embed_tokens.weight",
    r"output_norm\.weight": "model.norm.weight",
    r"output\.weight": "lm_head.weight",
    r"rope_freqs\.weight": ROPE_FACTORS,
    _BLOCK + r"attn_norm\.weight": r"model.layers.\1.input_layernorm.weight",
    _BLOCK + r"attn_([qkv])\.weight": r"model.layers.\1.self_attn.\2_proj.weight",
    _BLOCK + r"attn_output\.weight": r"model.layers.\1.self_attn.o_proj.weight",
    _BLOCK + r"ffn_norm\.weight": r"model.layers.\1.post_attention_layernorm.weight",
    _BLOCK + r"ffn_(gate|up|down)\.weight": r"model.layers.\1.mlp.\2_proj.weight",
}
"""GGUF's names -> ``import_llama``'s; there are no others, and no two have the same."""

UNSCALED = {
    "llama.rope.scale_linear": (0, 1),
    "llama.rope.scaling.factor": (0, 1),
    "llama.rope.scaling.attn_factor": (1,),
}
"""Keys of scaled rotary positions -> the values that scale nothing."""


def read_gguf(path: Path, template: str = "") -> Published:
    """Read a Llama from a GGUF file; its weights, fp32, are read when they are wanted.

    Args:
        template: name of the chat template; empty for the one that its tokenizer has the tokens of.

    Raises:
        UserError: if there is no such file, it is damaged, or holds something else than a Llama of
            the kind that can be built here.
        DataError: if its tokenizer does not fit.
    """
    if not path.is_file():
        raise UserError(f"There is no file {path}.")
    try:
        header = read_header(path)
    except (ValueError, KeyError, OSError) as error:
        raise UserError(f"{path} is no whole GGUF file: {error}.") from error
    try:
        language = _shape(header)
        tokenizer = with_markers(read_tokenizer(header.facts), str(path), template)
        names = _named(header.tensors)
        check_kinds(header)
    except ValueError as error:
        raise UserError(f"{path} cannot be used: {error}.") from error
    weights = {
        names[tensor.name]: Deferred(
            tensor.shape, partial(_values, path, tensor, _heads(names[tensor.name], language))
        )
        for tensor in header.tensors.values()
    }
    digest = file_sha256(path)
    return Published(language, weights, tokenizer, rules_of(language), digest=digest)


def _shape(header: Header) -> LanguageConfig:
    """The shape that a file's metadata say.

    Raises:
        ValueError: if it cannot be built here.
    """
    facts = header.facts
    kind = text(facts, "general.architecture")
    if kind != "llama":
        raise ValueError(f"it holds a {shown(kind)}, only llama can be read")
    hidden, heads = size(facts, "llama.embedding_length"), size(facts, "llama.attention.head_count")
    kv_heads = size(facts, "llama.attention.head_count_kv", heads)
    blocks = size(facts, "llama.block_count")
    _check_heads(facts, hidden, heads, kv_heads)
    _check_unscaled(facts)
    if facts.get("llama.expert_count", 0):
        raise ValueError("it is a mixture of experts, only dense models can be a base")
    if blocks > len(header.tensors):
        raise ValueError(f"it says {blocks} blocks, and has {len(header.tensors)} tensors")
    epsilon = _meant(number(facts, "llama.attention.layer_norm_rms_epsilon"))
    if not 0 < epsilon < 1:
        raise ValueError(f"llama.attention.layer_norm_rms_epsilon is {epsilon}")
    return LanguageConfig(
        blocks=blocks,
        hidden=hidden,
        ffn=size(facts, "llama.feed_forward_length"),
        heads=heads,
        kv_heads=kv_heads,
        vocabulary=len(listed(facts, "tokenizer.ggml.tokens", str)),
        max_tokens=size(facts, "llama.context_length"),
        rope_base=_meant(positive(facts, "llama.rope.freq_base", 10000)),
        norm_eps=epsilon,
        tied="output.weight" not in header.tensors,
    )


def _meant(stored: float) -> float:
    """A number that was stored in fp32: the shortest decimal that means the same."""
    return float(str(np.float32(stored)))


def _check_heads(facts: Facts, hidden: int, heads: int, kv_heads: int) -> None:
    """Refuse heads that cannot be built.

    Raises:
        ValueError: saying which.
    """
    if hidden % (2 * heads):
        raise ValueError(
            f"its width {hidden} is not {heads} heads (llama.attention.head_count) of an even size"
        )
    if heads % kv_heads:
        raise ValueError(f"its {heads} heads cannot share {kv_heads} key/value heads evenly")
    for name in ("rope.dimension_count", "attention.key_length", "attention.value_length"):
        found = size(facts, f"llama.{name}", hidden // heads)
        if found != hidden // heads:
            raise ValueError(f"llama.{name} is {found}, not hidden / heads = {hidden // heads}")


def _check_unscaled(facts: Facts) -> None:
    """Refuse scaled rotary positions; ``import_llama`` looks at their factors.

    Raises:
        ValueError: saying how they are scaled.
    """
    kind = text(facts, "llama.rope.scaling.type", "none")
    if kind != "none":
        raise ValueError(
            f"its rotary positions are scaled ({shown(kind)}), which is not known here"
        )
    for name, neutral in UNSCALED.items():
        if (value := number(facts, name, neutral[-1])) not in neutral:
            raise ValueError(
                f"its rotary positions are scaled ({name} is {shown(value)}), which "
                "is not known here"
            )


def _named(names: Iterable[str]) -> dict[str, str]:
    """GGUF's names -> ``import_llama``'s.

    Raises:
        ValueError: naming those that no Llama has.
    """
    found, unknown = {}, []
    for name in names:
        pattern = next((each for each in NAMES if re.fullmatch(each, name)), None)
        if pattern is None:
            unknown.append(f"{name} is not known")
        else:
            found[name] = re.sub(pattern, NAMES[pattern], name)
    if unknown:
        raise ValueError(some(sorted(unknown)))
    return found


def _heads(name: str, language: LanguageConfig) -> int:
    """In how many heads a tensor's rows were interleaved; 0 if they were not."""
    return {"q_proj": language.heads, "k_proj": language.kv_heads}.get(name.split(".")[-2], 0)


def _values(path: Path, tensor: StoredTensor, heads: int) -> Tensor:
    """A tensor's values, fp32, in transformers' layout.

    Raises:
        UserError: if the file changed since its header was read.
    """
    try:
        value = torch.from_numpy(read_values(path, tensor))
    except (ValueError, OSError) as error:
        raise UserError(f"{tensor.name} in {path} cannot be read: {error}.") from error
    return _unpermuted(value, heads) if heads else value


def _unpermuted(value: Tensor, heads: int) -> Tensor:
    """Undo what llama.cpp does to the rows of queries and keys of a Llama.

    It interleaves the two halves of every head (its rotary form turns neighbouring pairs);
    transformers' and Megatron's rotate halves.
    """
    pairs = value.view(heads, len(value) // heads // 2, 2, -1)
    return pairs.transpose(1, 2).reshape(value.shape)
