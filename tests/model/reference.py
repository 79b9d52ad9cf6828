"""Models of the transformers library, and how their weights are laid out in ours."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from unimoe_mcore.config.model import LanguageConfig


def llama(language: LanguageConfig, seed: int = 0) -> nn.Module:
    """A dense model with random weights."""
    return randomised(LlamaForCausalLM(LlamaConfig(**_shape(language))), seed)


def mixtral(language: LanguageConfig, experts: int, dense: list[int], seed: int = 0) -> nn.Module:
    """A mixture of two experts a token, with plain MLPs in the ``dense`` blocks."""
    config = MixtralConfig(
        **_shape(language), num_local_experts=experts, num_experts_per_tok=2, sliding_window=None
    )
    config._experts_implementation = "eager"
    model = MixtralForCausalLM(config)
    config.mlp_bias = False  # asked for by the Llama's layer
    for block in dense:
        model.model.layers[block].mlp = LlamaMLP(config)
    return randomised(model, seed)


def _shape(language: LanguageConfig) -> dict[str, object]:
    return {
        "vocab_size": language.vocabulary,
        "hidden_size": language.hidden,
        "intermediate_size": language.ffn,
        "num_hidden_layers": language.blocks,
        "num_attention_heads": language.heads,
        "num_key_value_heads": language.kv_heads,
        "rms_norm_eps": language.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": float(language.rope_base)},
        "tie_word_embeddings": language.tied,
        "attn_implementation": "eager",
        "use_cache": False,
    }


def randomised(model: nn.Module, seed: int) -> nn.Module:
    """Weights large enough that attention and routing are far from even; norms around one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(1 + 0.2 * noise if "norm" in name else 0.25 * noise)
    return model.eval()


def ours(theirs: dict[str, Tensor], language: LanguageConfig) -> dict[str, Tensor]:
    """Their tensors (weights, or gradients) under our names and in our layout.

    Raises:
        AssertionError: if one of theirs has no place in ours.
    """
    theirs = dict(theirs)
    named = {
        "embedding.word_embeddings.weight": theirs.pop("model.embed_tokens.weight"),
        "decoder.final_norm.weight": theirs.pop("model.norm.weight"),
    }
    head = theirs.pop("lm_head.weight", None)
    if head is not None and not language.tied:
        named["output_layer.weight"] = head
    for block in range(language.blocks):
        there = f"model.layers.{block}."
        attention, mlp = f"decoder.layers.{2 * block}.", f"decoder.layers.{2 * block + 1}."
        named[f"{attention}input_layernorm.weight"] = theirs.pop(f"{there}input_layernorm.weight")
        named[f"{attention}self_attention.linear_qkv.weight"] = fused(
            *(theirs.pop(f"{there}self_attn.{x}_proj.weight") for x in "qkv"), language.kv_heads
        )
        named[f"{attention}self_attention.linear_proj.weight"] = theirs.pop(
            f"{there}self_attn.o_proj.weight"
        )
        named[f"{mlp}pre_mlp_layernorm.weight"] = theirs.pop(
            f"{there}post_attention_layernorm.weight"
        )
        named |= {f"{mlp}mlp.{name}": x for name, x in _mlp(theirs, f"{there}mlp.").items()}
    assert not theirs, sorted(theirs)
    return named


def _mlp(theirs: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    if f"{prefix}gate.weight" not in theirs:
        halves = [theirs.pop(f"{prefix}{x}_proj.weight") for x in ("gate", "up")]
        return {
            "linear_fc1.weight": torch.cat(halves),
            "linear_fc2.weight": theirs.pop(f"{prefix}down_proj.weight"),
        }
    named = {"router.weight": theirs.pop(f"{prefix}gate.weight")}
    for there, here in (("gate_up_proj", "linear_fc1"), ("down_proj", "linear_fc2")):
        for expert, weight in enumerate(theirs.pop(f"{prefix}experts.{there}")):
            named[f"experts.local_experts.{expert}.{here}.weight"] = weight
    return named


def fused(query: Tensor, key: Tensor, value: Tensor, groups: int) -> Tensor:
    """Megatron's order: for each group its query heads, then its key, then its value."""
    parts = zip(*(x.chunk(groups) for x in (query, key, value)), strict=True)
    return torch.cat([torch.cat(part) for part in parts])
