"""A small random Llama as a GGUF file, to be read or spoilt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from tokenizers import pre_tokenizers

type Facts = dict[str, Any]
type Tensors = dict[str, tuple[np.ndarray, str]]

HIDDEN, FFN, HEADS, KV_HEADS, HEAD = 64, 96, 4, 2, 16
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<spare_{n}>" for n in range(5)))
TOKENS = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġt", "he", "Ġthe"]


def small(tied: bool = True) -> tuple[Facts, Tensors]:
    """Metadata, and values with how they are packed: two blocks with grouped queries."""
    facts = {
        "general.architecture": "llama",
        "llama.block_count": 2,
        "llama.context_length": 128,
        "llama.embedding_length": HIDDEN,
        "llama.feed_forward_length": FFN,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 5000.0,
        "llama.rope.dimension_count": HEAD,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": list(TOKENS),
        "tokenizer.ggml.token_type": [3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL)),
        "tokenizer.ggml.merges": ["Ġ t", "h e", "Ġt he"],
    }
    generator = np.random.Generator(np.random.PCG64(0))
    tensors: Tensors = {}

    def add(name: str, *shape: int, kind: str = "F32") -> None:
        values = generator.standard_normal(shape).astype(np.float32)
        tensors[name] = (1 + 0.2 * values if len(shape) == 1 else 0.25 * values), kind

    add("token_embd.weight", len(TOKENS), HIDDEN, kind="Q8_0")
    add("output_norm.weight", HIDDEN)
    if not tied:
        add("output.weight", len(TOKENS), HIDDEN)
    for block in range(2):
        add(f"blk.{block}.attn_norm.weight", HIDDEN)
        add(f"blk.{block}.ffn_norm.weight", HIDDEN)
        add(f"blk.{block}.attn_q.weight", HEADS * HEAD, HIDDEN, kind="Q4_1")
        for name in ("attn_k", "attn_v"):
            add(f"blk.{block}.{name}.weight", KV_HEADS * HEAD, HIDDEN, kind="Q4_1")
        add(f"blk.{block}.attn_output.weight", HIDDEN, HEADS * HEAD)
        for name in ("ffn_gate", "ffn_up"):
            add(f"blk.{block}.{name}.weight", FFN, HIDDEN, kind="Q4_1")
        add(f"blk.{block}.ffn_down.weight", HIDDEN, FFN, kind="Q4_1")
    return facts, tensors


def write(path: Path, facts: Facts, tensors: Tensors) -> Path:
    """Write them by the gguf package's own writer."""
    writer = gguf.GGUFWriter(path, str(facts["general.architecture"]))
    for name, value in facts.items():
        if name == "general.architecture":
            continue  # the writer has done it
        if isinstance(value, list):
            writer.add_array(name, value)
        else:
            writer.add_key_value(name, value, gguf.GGUFValueType.get_type(value))
    for name, (values, kind) in tensors.items():
        number = gguf.GGMLQuantizationType[kind]
        if kind == "F32" or values.dtype != np.float32:
            writer.add_tensor(name, values, raw_dtype=number)
        else:
            writer.add_tensor(name, gguf.quantize(values, number), raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
