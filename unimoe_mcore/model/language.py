"""The language model: Megatron's HybridModel with Llama-shaped layers."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

from unimoe_mcore.config.model import LanguageConfig, MoEConfig, layer_pattern
from unimoe_mcore.config.parallel import ParallelConfig
from unimoe_mcore.model.layers import groups_experts, stack_spec
from unimoe_mcore.runtime.groups import layout_flags

_RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    # By blocks: HybridModel counts attention and MLP as two layers.
    "full": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 2,
    },
}


def transformer_config(
    language: LanguageConfig,
    moe: MoEConfig,
    experts: int,
    parallel: ParallelConfig,
    dtype: torch.dtype,
    kernels: dict[str, Any],
    shared: bool = False,
    recompute: str = "none",
    adapted: Collection[str] = (),
) -> TransformerConfig:
    """Megatron's configuration of the language model.

    Args:
        experts: experts per MoE block; 0 for a dense model.
        shared: whether blocks with experts also have an MLP that every token passes.
        dtype: of weights and activations.
        kernels: whose modules, and fusion flags (``unimoe_mcore.runtime.capabilities``).
        recompute: ``none``, ``selective`` or ``full``.
        adapted: what will get adapters (``unimoe_mcore.model.layers``).
    """
    sparse: dict[str, Any] = {}
    if experts:
        sparse = {
            "num_moe_experts": experts,
            "moe_ffn_hidden_size": language.ffn,
            "moe_router_topk": moe.top_k,
            "moe_router_pre_softmax": moe.score == "pre_softmax",
            "moe_router_score_function": "sigmoid" if moe.score == "sigmoid" else "softmax",
            "moe_router_dtype": "fp32",
            # Losses and biases are those of our own router (``unimoe_mcore.model.router``).
            "moe_router_load_balancing_type": "none",
            "moe_aux_loss_coeff": 0.0,
            # Tells the dispatcher that a token may have fewer than top_k experts.
            "moe_expert_capacity_factor": moe.capacity or None,
            "moe_input_jitter_eps": moe.jitter or None,
            "moe_shared_expert_intermediate_size": language.ffn if shared else None,
        }
    return TransformerConfig(
        num_layers=2 * language.blocks,
        # Without it output layers start sqrt(2) too small: HybridModel counts two layers a block.
        is_hybrid_model=True,
        hidden_size=language.hidden,
        ffn_hidden_size=language.ffn,
        num_attention_heads=language.heads,
        num_query_groups=language.kv_heads,
        normalization="RMSNorm",
        layernorm_epsilon=language.norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=language.init_std,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        pipeline_dtype=dtype,
        # Packed rows differ in length from one micro-batch to the next, but for interleaved stages
        # (unimoe_mcore.training.pipeline).
        variable_seq_lengths=parallel.virtual_pipeline == 1,
        calculate_per_token_loss=True,
        **layout_flags(parallel),
        **_RECOMPUTE[recompute],
        **sparse,
        **{**kernels, "moe_grouped_gemm": groups_experts(kernels, adapted)},
    )


def pipeline_pattern(pattern: str, parallel: ParallelConfig) -> str:
    """The layer pattern with ``|`` between pipeline stages, each of whole blocks.

    Raises:
        ValueError: if the blocks cannot be divided evenly.
    """
    stages = parallel.pipeline * parallel.virtual_pipeline
    blocks = len(pattern) // 2
    if blocks % stages:
        raise ValueError(f"{blocks} blocks cannot be divided over {stages} pipeline stages")
    width = len(pattern) // stages
    return "|".join(pattern[i : i + width] for i in range(0, len(pattern), width))


def language_spec(
    config: TransformerConfig,
    language: LanguageConfig,
    moe: MoEConfig,
    experts: int,
    parallel: ParallelConfig,
    groups: ProcessGroupCollection,
    pre_process: bool,
    post_process: bool,
    vp_stage: int | None,
    adapted: Collection[str] = (),
) -> ModuleSpec:
    """HybridModel with its arguments, ready for ``MimoModelConfig``."""
    return ModuleSpec(
        module=HybridModel,
        params={
            "config": config,
            "hybrid_stack_spec": stack_spec(config, moe, adapted),
            "vocab_size": language.vocabulary,
            "max_sequence_length": language.max_tokens,
            "hybrid_layer_pattern": pipeline_pattern(
                layer_pattern(language, moe, experts), parallel
            ),
            "position_embedding_type": "rope",
            "rotary_base": language.rope_base,
            "share_embeddings_and_output_weights": language.tied,
            "pre_process": pre_process,
            "post_process": post_process,
            # MimoModel splices media before it scatters the sequence itself.
            "scatter_embedding_sequence_parallel": False,
            "pg_collection": groups,
            "vp_stage": vp_stage,
        },
    )
