"""What the layers of the language model are built of: Megatron's local modules, or its modules on
Transformer Engine.

Adapters (``unimoe_mcore.model.lora``) need the input of the layer that they adapt, and one matrix
per layer. So an adapted layer has its norm apart rather than fused - its output must be kept for
the adapter anyway - and adapted experts run one after another (``SequentialMLP``) rather than in
one grouped matrix product.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from megatron.core.extensions import transformer_engine as te
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.models.hybrid import hybrid_block
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    MoETransformerLayer,
    TransformerLayer,
    TransformerLayerSubmodules,
)

from unimoe_mcore.config.model import MoEConfig
from unimoe_mcore.model.attention import PackedAttention
from unimoe_mcore.model.names import FUSED_NORMS
from unimoe_mcore.model.router import BalancedRouter

FUSED_ATTENTION_TYPES = (torch.bfloat16, torch.float16)
"""Number formats of which Transformer Engine has kernels for packed rows (its plain fallback takes
none: ``attention/dot_product_attention/utils.py`` of 2.x, "Filter: QKV layout")."""


@dataclass(frozen=True)
class Modules:
    """The kinds of modules, each with Megatron's constructor arguments.

    Attributes:
        norm: RMSNorm.
        column: linear layer whose outputs are divided over tensor-parallel ranks.
        normed_column: the same with a norm before it in one module; None if there is none.
        row: linear layer whose inputs are divided.
        attention: core attention over packed rows.
    """

    norm: Any
    column: Any
    normed_column: Any
    row: Any
    attention: Any


def local_modules() -> Modules:
    """Megatron's own modules, which need no kernel package, and our packed attention."""
    return Modules(
        norm=WrappedTorchNorm,
        column=ColumnParallelLinear,
        normed_column=None,
        row=RowParallelLinear,
        attention=PackedAttention,
    )


def transformer_engine_modules(dtype: torch.dtype) -> Modules:
    """Megatron's modules on Transformer Engine.

    Its attention takes packed rows (``thd``) in 16 bit only; in fp32 ours takes its place.
    """
    return Modules(
        norm=te.TENorm,
        column=te.TEColumnParallelLinear,
        normed_column=te.TELayerNormColumnParallelLinear,
        row=te.TERowParallelLinear,
        attention=te.TEDotProductAttention if dtype in FUSED_ATTENTION_TYPES else PackedAttention,
    )


def modules_of(config: TransformerConfig) -> Modules:
    """The modules that ``config.transformer_impl`` names."""
    if config.transformer_impl == "transformer_engine":
        return transformer_engine_modules(config.params_dtype)
    return local_modules()


def groups_experts(kernels: dict[str, Any], adapted: Collection[str]) -> bool:
    """Whether a rank's experts run in one grouped matrix product.

    Args:
        kernels: fusion flags (``unimoe_mcore.runtime.capabilities``).
        adapted: what has adapters: ``attention``, ``mlp``, ``experts``.
    """
    return bool(kernels["moe_grouped_gemm"]) and "experts" not in adapted


def stack_spec(config: TransformerConfig, moe: MoEConfig, adapted: Collection[str]) -> ModuleSpec:
    """HybridModel's layers.

    Args:
        config: says whose modules, and how many experts an MoE block has.
        adapted: what will get adapters: ``attention``, ``mlp``, ``experts``.
    """
    modules = modules_of(config)
    layers: dict[str, Any] = {
        "attention_layer": _attention_layer(modules, "attention" not in adapted),
        "mlp_layer": _mlp_layer(modules, "mlp" not in adapted),
    }
    if config.num_moe_experts:
        layers["moe_layer"] = _moe_layer(config, modules, moe)
    return ModuleSpec(
        module=hybrid_block.HybridStack,
        submodules=hybrid_block.HybridStackSubmodules(**layers),
    )


def _first(modules: Modules, fused: bool) -> tuple[Any, Any]:
    """The norm before a column-parallel linear layer, and that layer."""
    if fused and modules.normed_column is not None:
        return IdentityOp, modules.normed_column
    return modules.norm, modules.column


def _attention_layer(modules: Modules, fused: bool) -> ModuleSpec:
    norm, linear = _first(modules, fused)
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=linear, core_attention=modules.attention, linear_proj=modules.row
        ),
    )
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=dict(FUSED_NORMS),
        ),
    )


def _mlp_layer(modules: Modules, fused: bool) -> ModuleSpec:
    norm, linear = _first(modules, fused)
    dense = ModuleSpec(
        module=MLP, submodules=MLPSubmodules(linear_fc1=linear, linear_fc2=modules.row)
    )
    return ModuleSpec(
        module=MLPLayer,
        submodules=TransformerLayerSubmodules(
            pre_mlp_layernorm=norm,
            mlp=dense,
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=dict(FUSED_NORMS),
        ),
    )


def _moe_layer(config: TransformerConfig, modules: Modules, moe: MoEConfig) -> ModuleSpec:
    spec: Any = get_moe_module_spec(
        use_te=config.transformer_impl == "transformer_engine",
        num_experts=config.num_moe_experts,
        moe_grouped_gemm=config.moe_grouped_gemm,
    )
    parts = replace(spec.keywords["submodules"], router=partial(BalancedRouter, moe=moe))
    return ModuleSpec(
        module=MoETransformerLayer,
        submodules=TransformerLayerSubmodules(
            pre_mlp_layernorm=modules.norm,
            mlp=partial(spec.func, submodules=parts),
            mlp_bda=get_bias_dropout_add,
        ),
    )
