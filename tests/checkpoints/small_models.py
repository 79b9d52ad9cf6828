"""Small random models in transformers' own folders, with a tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)

from tests.checkpoints.small_gguf import TOKENS
from tests.checkpoints.small_tokenizer import tokenizer

HIDDEN, FFN, HEADS = 64, 96, 4
ROWS = len(TOKENS)
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
"""Over 200 positions, with half a head of 8 frequencies, some are fast, some slow, one between."""

_KINDS = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "mixtral": (MixtralConfig, MixtralForCausalLM),
}


_FACTS = {
    "vocab_size": ROWS,
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.5},
    "attn_implementation": "eager",
    "sliding_window": None,
}


def model_of(kind: str, **changes: Any) -> PreTrainedModel:
    """A random model whose logits differ by more than their rounding, fp32."""
    config, model = _KINDS[kind]
    return _filled(model(config(**{**_FACTS, **changes})))


def llava() -> LlavaForConditionalGeneration:
    """The same with a vision tower and a projector of features of 32 numbers."""
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    language = LlamaConfig(**_FACTS)
    config = LlavaConfig(vision_config=vision, text_config=language, image_token_index=ROWS - 1)
    return _filled(LlavaForConditionalGeneration(config))


def _filled[M: PreTrainedModel](made: M) -> M:
    torch.manual_seed(0)
    made = made.float().eval()
    with torch.no_grad():
        for name, value in made.named_parameters():
            values = torch.randn(value.shape)
            value.copy_(1 + 0.2 * values if name.endswith("norm.weight") else 0.25 * values)
    return made


def saved(folder: Path, model: PreTrainedModel, pieces: bool = False) -> Path:
    """A model's folder as transformers writes it, in several files if asked to."""
    model.save_pretrained(folder, max_shard_size="60KB" if pieces else "1GB")
    tokenizer().save(str(folder / "tokenizer.json"))
    return folder
