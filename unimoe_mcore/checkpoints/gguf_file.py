"""Published language models in one GGUF file: weights, shape and tokenizer.

GGUF is the format of llama.cpp. Its weights are mostly in 4 to 8 bits; here they are multiplied out
again, which does not bring back what the rounding took.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, dequantize
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from data_pipeline.conversation.published import with_markers
from data_pipeline.conversation.tokenizer import TextTokenizer
from unimoe_mcore.config.errors import UserError
from unimoe_mcore.config.model import LanguageConfig

NAMES = {
    r"token_embd\.weight": "model.embed_tokens.weight",
    r"output_norm\.weight": "model.norm.weight",
    r"output\.weight": "lm_head.weight",
    r"blk\.(\d+)\.attn_norm\.weight": r"model.layers.\1.input_layernorm.weight",
    r"blk\.(\d+)\.attn_([qkv])\.weight": r"model.layers.\1.self_attn.\2_proj.weight",
    r"blk\.(\d+)\.attn_output\.weight": r"model.layers.\1.self_attn.o_proj.weight",
    r"blk\.(\d+)\.ffn_norm\.weight": r"model.layers.\1.post_attention_layernorm.weight",
    r"blk\.(\d+)\.ffn_(gate|up|down)\.weight": r"model.layers.\1.mlp.\2_proj.weight",
}
"""GGUF's names -> transformers'; others keep their own."""

_CONTROL = 3
"""GGUF's type of special tokens."""


@dataclass(frozen=True)
class Published:
    """A published language model.

    Attributes:
        language: its shape.
        tensors: transformers' name -> values, fp32, in transformers' layout.
        tokenizer: its tokenizer, with media markers.
    """

    language: LanguageConfig
    tensors: dict[str, Tensor]
    tokenizer: TextTokenizer


def read_gguf(path: Path) -> Published:
    """Read a Llama from a GGUF file.

    Raises:
        UserError: if there is no such file, it is damaged, or holds something else than a Llama of
            the kind that can be built here.
        DataError: if its tokenizer does not fit.
    """
    if not path.is_file():
        raise UserError(f"There is no file {path}.")
    try:
        reader = GGUFReader(path)
        tensors = {str(tensor.name): tensor for tensor in reader.tensors}
        facts = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, KeyError, IndexError, TypeError, OSError, OverflowError) as error:
        raise UserError(f"{path} is no whole GGUF file: {error}.") from error
    try:
        language = _shape(facts, tied="output.weight" not in tensors)
        tokenizer = with_markers(_tokenizer(facts), str(path))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} cannot be used: {error}.") from error
    weights = {}
    for name, tensor in tensors.items():
        named = _named(name)
        value = _values(tensor)
        weights[named] = _unpermuted(value, named, language)
    return Published(language, weights, tokenizer)


def _shape(facts: dict[str, Any], tied: bool) -> LanguageConfig:
    """The shape that a file's metadata say.

    Raises:
        ValueError: if it cannot be built here.
    """
    if facts["general.architecture"] != "llama":
        raise ValueError(f"it holds a {facts['general.architecture']}, only llama can be read")

    def fact(name: str) -> Any:
        return facts[f"llama.{name}"]

    hidden, heads = int(fact("embedding_length")), int(fact("attention.head_count"))
    scaling = facts.get("llama.rope.scaling.type", "none")
    if scaling != "none":
        raise ValueError(f"its rotary positions are scaled ({scaling}), which is not known here")
    if facts.get("llama.expert_count", 0):
        raise ValueError("it is a mixture of experts, only dense models can be a base")
    for name in ("rope.dimension_count", "attention.key_length", "attention.value_length"):
        size = facts.get(f"llama.{name}", hidden // heads)
        if size != hidden // heads:
            raise ValueError(f"llama.{name} is {size}, not hidden / heads = {hidden // heads}")
    return LanguageConfig(
        blocks=int(fact("block_count")),
        hidden=hidden,
        ffn=int(fact("feed_forward_length")),
        heads=heads,
        kv_heads=int(facts.get("llama.attention.head_count_kv", heads)),
        vocabulary=len(facts["tokenizer.ggml.tokens"]),
        max_tokens=int(fact("context_length")),
        rope_base=int(facts.get("llama.rope.freq_base", 10000)),
        # Stored in fp32: the shortest decimal that means the same is what was meant.
        norm_eps=float(str(np.float32(fact("attention.layer_norm_rms_epsilon")))),
        tied=tied,
    )


def _named(name: str) -> str:
    for pattern, theirs in NAMES.items():
        if re.fullmatch(pattern, name):
            return re.sub(pattern, theirs, name)
    return name


def _values(tensor: Any) -> Tensor:
    """A tensor's values, fp32; GGUF lists its sizes from the innermost axis on."""
    shape = tuple(int(size) for size in reversed(tensor.shape))
    values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
    return torch.from_numpy(np.array(values)).view(shape)


def _unpermuted(value: Tensor, name: str, language: LanguageConfig) -> Tensor:
    """Undo what llama.cpp does to the rows of queries and keys of a Llama.

    It interleaves the two halves of every head (its rotary form turns neighbouring pairs);
    transformers' and Megatron's rotate halves.
    """
    heads = {"q_proj": language.heads, "k_proj": language.kv_heads}.get(name.split(".")[-2])
    if heads is None or len(value) % (2 * heads):
        return value
    pairs = value.view(heads, len(value) // heads // 2, 2, -1)
    return pairs.transpose(1, 2).reshape(value.shape)


PRE_TOKENIZERS = {
    "smollm": lambda: pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    ),
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
}
"""``tokenizer.ggml.pre`` -> how text is cut into words before byte pairs are merged."""


def _tokenizer(facts: dict[str, Any]) -> Tokenizer:
    """The byte-level BPE of a file's metadata.

    Raises:
        ValueError: if it is of another kind.
    """
    kind, cut = facts["tokenizer.ggml.model"], facts.get("tokenizer.ggml.pre", "")
    if kind != "gpt2" or cut not in PRE_TOKENIZERS:
        known = ", ".join(PRE_TOKENIZERS)
        raise ValueError(f"its tokenizer is {kind} / {cut or 'none'}, known are gpt2 / {known}")
    tokens = facts["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in facts["tokenizer.ggml.merges"]]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[cut]()
    tokenizer.decoder = decoders.ByteLevel()
    kinds = zip(tokens, facts["tokenizer.ggml.token_type"], strict=True)
    special = [
        AddedToken(token, special=True, normalized=False) for token, k in kinds if k == _CONTROL
    ]
    tokenizer.add_special_tokens(special)
    return tokenizer
