"""A small random Llama as a folder of Hugging Face's form, to be read or spoilt."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from tests.checkpoints.small_gguf import TOKENS
from tests.checkpoints.small_tokenizer import tokenizer

HIDDEN, FFN, ROWS = 64, 96, len(TOKENS)


def config() -> dict[str, Any]:
    """Two blocks with grouped queries; every key that a Llama's config has."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "max_position_embeddings": 128,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-5,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "vocab_size": ROWS,
    }


def tensors() -> dict[str, Tensor]:
    """Its tensors, bf16."""
    generator = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (ROWS, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (ROWS, HIDDEN),
    }
    for block in range(2):
        there = f"model.layers.{block}."
        shapes |= {
            there + "input_layernorm.weight": (HIDDEN,),
            there + "post_attention_layernorm.weight": (HIDDEN,),
            there + "self_attn.q_proj.weight": (HIDDEN, HIDDEN),
            there + "self_attn.k_proj.weight": (HIDDEN // 2, HIDDEN),
            there + "self_attn.v_proj.weight": (HIDDEN // 2, HIDDEN),
            there + "self_attn.o_proj.weight": (HIDDEN, HIDDEN),
            there + "mlp.gate_proj.weight": (FFN, HIDDEN),
            there + "mlp.up_proj.weight": (FFN, HIDDEN),
            there + "mlp.down_proj.weight": (HIDDEN, FFN),
        }
    return {
        name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()
    }


@dataclass
class Model:
    """What a folder is written of; a test changes it first."""

    config: dict[str, Any] = field(default_factory=config)
    tensors: dict[str, Tensor] = field(default_factory=tensors)
    tokenizer: Tokenizer = field(default_factory=tokenizer)

    def write(self, folder: Path, form: str = "safetensors") -> Path:
        """Write the folder; ``form`` is ``safetensors``, ``bin`` or either with ``, sharded``."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config))
        self.tokenizer.save(str(folder / "tokenizer.json"))
        kind, _, sharded = form.partition(", ")
        stem = "model" if kind == "safetensors" else "pytorch_model"
        if not sharded:
            _save(self.tensors, folder / f"{stem}.{kind}")
            return folder
        names = list(self.tensors)
        places = {}
        for number, first in enumerate(range(0, len(names), 8)):
            file = f"{stem}-{number}.{kind}"
            chosen = names[first : first + 8]
            _save({name: self.tensors[name] for name in chosen}, folder / file)
            places |= dict.fromkeys(chosen, file)
        index = {"metadata": {}, "weight_map": places}
        (folder / f"{stem}.{kind}.index.json").write_text(json.dumps(index))
        return folder


def _save(values: dict[str, Tensor], path: Path) -> None:
    if path.suffix == ".bin":
        torch.save(values, path)
    else:
        save_file({name: value.contiguous() for name, value in values.items()}, path)
