"""Low-rank adapters on Megatron's parallel linear layers.

Hu et al. 2021, eq. 3: ``W x + (alpha / rank) * B A x``, ``A`` random and ``B`` zero at first.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
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

_COLUMN = ("linear_qkv", "linear_fc1")
_LINEARS = {
    "attention": ("linear_qkv", "linear_proj"),
    "mlp": ("linear_fc1", "linear_fc2"),
    "experts": ("linear_fc1", "linear_fc2"),
}


def tensor_group(layer: Any) -> dist.ProcessGroup:
    """The ranks that share a parallel linear layer's matrix.

    Megatron's modules on Transformer Engine keep it under another name: their ``tp_group`` is what
    Transformer Engine communicates over itself, which in an expert is nothing.
    """
    group: dist.ProcessGroup = layer._tp_group if hasattr(layer, "_tp_group") else layer.tp_group
    return group


class Adapted(nn.Module):
    """Mixed into a parallel linear layer, local or Transformer Engine's, when it gets an adapter.

    Attributes:
        lora_a: the half on the side of the inputs, ``[rank, in]``.
        lora_b: the half on the side of the outputs, ``[out, rank]``.
        lora_scale: what their product is multiplied by.
    """

    lora_a: nn.Linear | RowParallelLinear
    lora_b: nn.Linear | ColumnParallelLinear
    lora_scale: float
    weight: Tensor

    def _sharded(self, prefix: str, offsets: Any, metadata: Any, axes: dict[str, int]) -> Any:
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        state = {
            name: tensor
            for name, tensor in self.state_dict(prefix="", keep_vars=True).items()
            if "_extra_state" not in name
        }
        return make_sharded_tensors_for_checkpoint(
            state,
            prefix,
            axes,
            offsets,
            tp_group=tensor_group(self),
            dp_cp_group=metadata["dp_cp_group"],
        )


class AdaptedColumn(Adapted):
    """A column-parallel linear with an adapter: ``A`` is replicated, ``B`` sharded like ``W``."""

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
        state: dict[str, Any] = self._sharded(prefix, sharded_offsets, metadata, axes)
        if self.gated:
            name = f"{prefix}lora_b.weight"
            metadata = ensure_metadata_has_dp_cp_group(metadata)
            state[name] = apply_swiglu_sharded_factory(
                state[name],
                sharded_offsets,
                tp_group=tensor_group(self),
                dp_group=metadata["dp_cp_group"],
            )
        return state


class AdaptedRow(Adapted):
    """A row-parallel linear with an adapter: ``A`` is sharded like ``W``, ``B`` replicated."""

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """``[..., in / TP]`` to ``[..., out]``, and the bias that was not added."""
        output, bias = super().forward(input_)
        return output + self.lora_b(self.lora_a(input_)[0]) * self.lora_scale, bias

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
    ) -> dict[str, Any]:
        """The frozen weight under its own name, and the adapter's halves."""
        axes = {"weight": 1, "lora_a.weight": 1}
        state: dict[str, Any] = self._sharded(prefix, sharded_offsets, metadata, axes)
        return state


@cache
def _adapted(adapter: Any, layer: Any) -> type[Adapted]:
    """The class of a layer with an adapter mixed in: ``layer`` is its class without."""
    return type(f"Adapted{layer.__name__}", (adapter, layer), {})


def targeted_linears(
    language_model: nn.Module, targets: list[str]
) -> Iterator[tuple[str, nn.Module]]:
    """Names and layers that the targets mean: attention, dense MLPs, experts."""
    for name, layer in language_model.named_modules():
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

    Raises:
        TypeError: if a layer is fused with its norm or with other experts: the model was built
            without saying what gets adapters (``unimoe_mcore.model.layers``).
    """
    adapted = []
    for name, layer in list(targeted_linears(language_model, config.targets)):
        if not isinstance(getattr(layer, "weight", None), Tensor) or hasattr(
            layer, "layer_norm_weight"
        ):
            raise TypeError(f"{name} is fused with others and cannot have an adapter")
        _adapt(name, layer, config)
        adapted.append(name)
    return adapted


def _adapt(name: str, layer: Any, config: LoRAConfig) -> None:
    group, is_expert = tensor_group(layer), ".experts." in name
    dtype, device = layer.weight.dtype, layer.weight.device
    # The halves are local modules whatever the layer is: they are small.
    parallel: dict[str, Any] = {
        "config": layer.config,
        "init_method": nn.init.zeros_,
        "bias": False,
        "skip_bias_add": True,
        "is_expert": is_expert,
        "tp_group": group,
    }
    outputs, inputs = layer.weight.shape
    if name.endswith(_COLUMN):
        replicated = nn.Linear(inputs, config.rank, bias=False, dtype=dtype, device=device)
        sharded: nn.Module = ColumnParallelLinear(
            config.rank, outputs * group.size(), gather_output=False, **parallel
        )
        layer.lora_a, layer.lora_b = replicated, sharded
        layer.gated = name.endswith("linear_fc1") and layer.config.gated_linear_unit
        layer.__class__ = _adapted(AdaptedColumn, layer.__class__)
    else:
        sharded = RowParallelLinear(
            inputs * group.size(), config.rank, input_is_parallel=True, **parallel
        )
        replicated = nn.Linear(config.rank, outputs, bias=False, dtype=dtype, device=device)
        layer.lora_a, layer.lora_b = sharded, replicated
        layer.__class__ = _adapted(AdaptedRow, layer.__class__)
    layer.lora_scale = config.alpha / config.rank
    _mark(replicated.weight, layer, is_expert)


def _mark(replicated: Tensor, layer: Any, is_expert: bool) -> None:
    """Say how the gradient of an adapter's replicated half is made whole.

    It is an ordinary ``nn.Linear``. Outside of experts every tensor rank sees a part of the
    sequence, which Megatron knows by ``sequence_parallel``. In an expert every rank that shares
    its matrices sees all of its tokens, but only what its own shard of the other half makes of
    them: the gradient is a part of a sum over these ranks. ``allreduce`` names the group of
    replicas, which must be the frozen weight's.
    """
    if not is_expert:
        replicated.sequence_parallel = layer.config.sequence_parallel  # type: ignore[attr-defined]
        return
    replicated.allreduce = layer.weight.allreduce  # type: ignore[attr-defined]
    setattr(replicated, EXPERT_PARTIAL, tensor_group(layer).size() > 1)


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
        if isinstance(layer, Adapted):
            a, b = layer.lora_a.weight.float(), layer.lora_b.weight.float()
            weight = layer.weight.float() + layer.lora_scale * (b @ a)
            merged[name] = weight.to(layer.weight.dtype).detach()
    return merged
