from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import TransformerEngineBaseModule, mark_tensor_parallel


def _divided(size: int, parts: int) -> int:
    assert size % parts == 0
    return size // parts


class _Parallel(TransformerEngineBaseModule):
    """Sizes and communication as Transformer Engine has them; runs in one process only."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        sequence_parallel: bool,
        fuse_wgrad_accumulation: bool,
        tp_group: Any,
        tp_size: int,
        bias: bool,
        return_bias: bool,
        parallel_mode: str | None,
    ) -> None:
        super().__init__()
        assert not bias
        assert not return_bias
        assert parallel_mode in ("column", "row", None)
        self.use_bias, self.return_bias, self.parallel_mode = bias, return_bias, parallel_mode
        self.fuse_wgrad_accumulation = fuse_wgrad_accumulation
        self.tp_group, self.tp_size = tp_group, tp_size if tp_group is None else tp_group.size()
        self.sequence_parallel = self.tp_size > 1 and sequence_parallel
        self.in_features, self.out_features = in_features, out_features
        if parallel_mode == "column":
            self.out_features = _divided(out_features, self.tp_size)
        if parallel_mode == "row":
            self.in_features = _divided(in_features, self.tp_size)

    def _alone(self) -> None:
        if self.tp_size > 1:
            raise NotImplementedError("the stand-in computes in one process only")


class Linear(_Parallel):
    """``weight`` ``[out, in]``."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        get_rng_state_tracker: Callable[[], Any] | None = None,
        init_method: Callable[[Tensor], Any] | None = None,
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        device: Any = "cuda",
        rng_tracker_name: str | None = None,
    ) -> None:
        super().__init__(
            in_features, out_features, sequence_parallel, fuse_wgrad_accumulation, tp_group,
            tp_size, bias, return_bias, parallel_mode,
        )  # fmt: skip
        self.rng_tracker_name = rng_tracker_name
        shape = (self.out_features, self.in_features)
        draw = init_method or nn.init.normal_
        self.add("weight", shape, device, params_dtype, draw, get_rng_state_tracker)
        self.reset_parameters(defer_init=device == "meta")

    def reset_parameters(self, defer_init: bool = False) -> None:
        """Also marks the weight as divided, whether it is or not."""
        super().reset_parameters(defer_init)
        if not defer_init:
            mark_tensor_parallel(self.weight, 1 if self.parallel_mode == "row" else 0)

    def forward(self, inp: Tensor, is_first_microbatch: bool | None = None) -> Tensor:
        """``[..., in]`` to ``[..., out]``."""
        self._alone()
        return F.linear(inp, self.weight)


class LayerNormLinear(_Parallel):
    """``layer_norm_weight`` ``[in]``, ``weight`` ``[out, in]``."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        eps: float = 1e-5,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        get_rng_state_tracker: Callable[[], Any] | None = None,
        init_method: Callable[[Tensor], Any] | None = None,
        bias: bool = True,
        normalization: str = "LayerNorm",
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        return_layernorm_output: bool = False,
        zero_centered_gamma: bool = False,
        device: Any = "cuda",
    ) -> None:
        super().__init__(
            in_features, out_features, sequence_parallel, fuse_wgrad_accumulation, tp_group,
            tp_size, bias, return_bias, parallel_mode,
        )  # fmt: skip
        assert normalization == "RMSNorm"
        assert not return_layernorm_output
        assert not zero_centered_gamma
        self.eps = eps
        self.add("layer_norm_weight", (in_features,), device, params_dtype, nn.init.ones_)
        shape = (self.out_features, self.in_features)
        draw = init_method or nn.init.normal_
        self.add("weight", shape, device, params_dtype, draw, get_rng_state_tracker)
        self.reset_parameters(defer_init=device == "meta")

    def reset_parameters(self, defer_init: bool = False) -> None:
        """Also marks the norm as replicated, the weight as divided."""
        super().reset_parameters(defer_init)
        if not defer_init:
            self.layer_norm_weight.sequence_parallel = self.sequence_parallel
            mark_tensor_parallel(self.weight, 1 if self.parallel_mode == "row" else 0)

    def forward(self, inp: Tensor, is_first_microbatch: bool | None = None) -> Tensor:
        """``[..., in]`` to ``[..., out]``."""
        self._alone()
        normed = F.rms_norm(inp, inp.shape[-1:], self.layer_norm_weight, self.eps)
        return F.linear(normed, self.weight)


class GroupedLinear(_Parallel):
    """``weight0`` ... of ``num_gemms`` linear layers, each ``[out, in]``."""

    def __init__(
        self,
        num_gemms: int,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        get_rng_state_tracker: Callable[[], Any] | None = None,
        rng_tracker_name: str | None = None,
        init_method: Callable[[Tensor], Any] | None = None,
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        device: Any = "cuda",
        ub_name: str | None = None,
        single_grouped_weight: bool = False,
        single_grouped_bias: bool = False,
    ) -> None:
        super().__init__(
            in_features, out_features, sequence_parallel, fuse_wgrad_accumulation, tp_group,
            tp_size, bias, return_bias, parallel_mode,
        )  # fmt: skip
        assert not single_grouped_weight
        assert not single_grouped_bias
        self.num_gemms, self.rng_tracker_name = num_gemms, rng_tracker_name
        shape = (self.out_features, self.in_features)
        draw = init_method or nn.init.normal_
        for gemm in range(num_gemms):
            self.add(f"weight{gemm}", shape, device, params_dtype, draw, get_rng_state_tracker)
        self.reset_parameters(defer_init=torch.device(device).type == "meta")

    def reset_parameters(self, defer_init: bool = False) -> None:
        """Also marks the weights as divided, whether they are or not."""
        super().reset_parameters(defer_init)
        if not defer_init:
            for parameter in self.parameters():
                mark_tensor_parallel(parameter, 1 if self.parallel_mode == "row" else 0)

    def forward(
        self, inp: Tensor, m_splits: list[int], is_first_microbatch: bool | None = None
    ) -> Tensor:
        """``[tokens, in]``, the first ``m_splits[0]`` for the first layer, to ``[tokens, out]``."""
        self._alone()
        rows = inp.split(m_splits)
        weights = [getattr(self, f"weight{gemm}") for gemm in range(self.num_gemms)]
        return torch.cat([F.linear(x, w) for x, w in zip(rows, weights, strict=True)])
