"""Low-rank adapters on Megatron's parallel linear layers.

Hu et al. 2021, eq. 3: ``W x + (alpha / rank) * B A x``, ``A`` random and ``B`` zero at first.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
)
from torch import Tensor, nn

from unimoe_mcore.config.model import LoRAConfig

EXPERT_PARTIAL = "expert_tensor_partial"
"""Mark of parameters whose gradient must be summed over the ranks that share an expert's matrices
(``unimoe_mcore.training.gradients``)."""

_LINEARS = {
    "attention": ("linear_qkv", "linear_proj"),
    "mlp": ("linear_fc1", "linear_fc2"),
    "experts": ("linear_fc1", "linear_fc2"),
}


def _sharded(layer: Any, prefix: str, offsets: Any, metadata: Any, axes: dict[str, int]) -> Any:
    metadata = ensure_metadata_has_dp_cp_group(metadata)
    state = {
        name: tensor
        for name, tensor in layer.state_dict(prefix="", keep_vars=True).items()
        if "_extra_state" not in name
    }
    return make_sharded_tensors_for_checkpoint(
        state,
        prefix,
        axes,
        offsets,
        tp_group=layer.tp_group,
        dp_cp_group=metadata["dp_cp_group"],
    )


class LoRAColumnLinear(ColumnParallelLinear):
    """A column-parallel linear with an adapter: ``A`` is replicated, ``B`` sharded like ``W``."""

    lora_a: nn.Linear
    lora_b: ColumnParallelLinear
    lora_scale: float
    gated: bool

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """``[..., in]`` to ``[..., out / TP]``, and the bias that was not added."""
        output, bias = super().forward(input_, *args, **kwargs)
        return output + self.lora_b(self.lora_a(input_))[0] * self.lora_scale, bias

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
    ) -> dict[str, Any]:
        """The frozen weight under its own name, and the adapter's halves.

        A gated layer holds ``[gate; up]`` of its own shard. Megatron splits the frozen weight on
        the way to disk so that another tensor-parallel size can read it; ``B`` needs the same.
        """
        axes = {"weight": 0, "lora_b.weight": 0}
        state = _sharded(self, prefix, sharded_offsets, metadata, axes)
        if self.gated:
            name = f"{prefix}lora_b.weight"
            metadata = ensure_metadata_has_dp_cp_group(metadata)
            state[name] = apply_swiglu_sharded_factory(
                state[name],
                sharded_offsets,
                tp_group=self.tp_group,
                dp_group=metadata["dp_cp_group"],
            )
        return state


class LoRARowLinear(RowParallelLinear):
    """A row-parallel linear with an adapter: ``A`` is sharded like ``W``, ``B`` replicated."""

    lora_a: RowParallelLinear
    lora_b: nn.Linear
    lora_scale: float

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """``[..., in / TP]`` to ``[..., out]``, and the bias that was not added."""
        output, bias = super().forward(input_)
        return output + self.lora_b(self.lora_a(input_)[0]) * self.lora_scale, bias

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
    ) -> dict[str, Any]:
        """The frozen weight under its own name, and the adapter's halves."""
        axes = {"weight": 1, "lora_a.weight": 1}
        return _sharded(self, prefix, sharded_offsets, metadata, axes)


def targeted_linears(
    language_model: nn.Module, targets: list[str]
) -> Iterator[tuple[str, ColumnParallelLinear | RowParallelLinear]]:
    """Names and layers that the targets mean: attention, dense MLPs, experts."""
    for name, layer in language_model.named_modules():
        if not isinstance(layer, ColumnParallelLinear | RowParallelLinear):
            continue
        last = name.rsplit(".", 1)[-1]
        kind = "experts" if ".experts." in name else "mlp" if ".mlp." in name else "attention"
        if kind in targets and last in _LINEARS[kind]:
            yield name, layer


def add_lora(language_model: nn.Module, config: LoRAConfig) -> list[str]:
    """Give the targeted linears an adapter, in place.

    Its weights have no values yet: ``unimoe_mcore.model.initialise`` fills them by name, so that
    they are the same in every layout; ``B`` with zeros, so that it changes nothing at first.

    Returns:
        Names of the adapted layers.
    """
    adapted = []
    for name, layer in list(targeted_linears(language_model, config.targets)):
        _adapt(layer, config)
        if isinstance(layer, LoRAColumnLinear):
            layer.gated = name.endswith("linear_fc1") and layer.config.gated_linear_unit
        adapted.append(name)
    return adapted


def _adapt(layer: ColumnParallelLinear | RowParallelLinear, config: LoRAConfig) -> None:
    dtype, device = layer.weight.dtype, layer.weight.device
    parallel: dict[str, Any] = {
        "config": layer.config,
        "init_method": nn.init.zeros_,
        "bias": False,
        "skip_bias_add": True,
        "is_expert": layer.is_expert,
        "tp_group": layer.tp_group,
    }
    if isinstance(layer, ColumnParallelLinear):
        replicated = nn.Linear(
            layer.input_size, config.rank, bias=False, dtype=dtype, device=device
        )
        sharded: nn.Module = ColumnParallelLinear(
            config.rank, layer.output_size, gather_output=False, **parallel
        )
        layer.lora_a, layer.lora_b = replicated, sharded
        layer.__class__ = LoRAColumnLinear
    else:
        sharded = RowParallelLinear(
            layer.input_size, config.rank, input_is_parallel=True, **parallel
        )
        replicated = nn.Linear(
            config.rank, layer.output_size, bias=False, dtype=dtype, device=device
        )
        layer.lora_a, layer.lora_b = sharded, replicated
        layer.__class__ = LoRARowLinear
    layer.lora_scale = config.alpha / config.rank
    _mark(replicated.weight, layer)


def _mark(replicated: Tensor, layer: ColumnParallelLinear | RowParallelLinear) -> None:
    """Say how the gradient of an adapter's replicated half is made whole.

    It is an ordinary ``nn.Linear``. Outside of experts every tensor rank sees a part of the
    sequence, which Megatron knows by ``sequence_parallel``. In an expert every rank that shares
    its matrices sees all of its tokens, but only what its own shard of the other half makes of
    them: the gradient is a part of a sum over these ranks. ``allreduce`` names the group of
    replicas, which must be the frozen weight's.
    """
    if not layer.is_expert:
        replicated.sequence_parallel = layer.config.sequence_parallel  # type: ignore[attr-defined]
        return
    replicated.allreduce = layer.weight.allreduce  # type: ignore[attr-defined]
    setattr(replicated, EXPERT_PARTIAL, layer.tp_group.size() > 1)


def lora_initial(key: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Initial value of one adapter tensor: ``A`` as ``nn.Linear`` (kaiming, a = sqrt 5), ``B`` 0.

    Args:
        key: its name on disk.
        shape: of the global tensor; the last axis is the input.
    """
    if ".lora_b." in key:
        return torch.zeros(shape)
    bound = 1 / math.sqrt(shape[-1])
    return (torch.rand(shape, generator=generator) * 2 - 1) * bound


def merge_lora(language_model: nn.Module) -> dict[str, Tensor]:
    """The adapted weights with their adapters added, fp32 arithmetic, in the weight's dtype.

    Returns:
        Layer name -> merged weight ``[out / TP, in]`` (column) or ``[out, in / TP]`` (row).
        The layers themselves are left as they are.
    """
    merged = {}
    for name, layer in language_model.named_modules():
        if isinstance(layer, LoRAColumnLinear | LoRARowLinear):
            a, b = layer.lora_a.weight.float(), layer.lora_b.weight.float()
            weight = layer.weight.float() + layer.lora_scale * (b @ a)
            merged[name] = weight.to(layer.weight.dtype).detach()
    return merged
