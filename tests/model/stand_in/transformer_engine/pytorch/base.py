"""What Transformer Engine's modules with weights have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class TransformerEngineBaseModule(nn.Module):
    """Keeps how each parameter is drawn; draws all at the end of construction, then marks them.

    A parameter on the meta device is given memory before it is drawn, unless the module was asked
    for on the meta device: ``reset_parameters`` in ``module/base.py``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fp8 = self.fp8_calibration = False
        self.fp8_meta: dict[str, Any] = {"fp8_checkpoint": False, "recipe": None}
        self._drawn: dict[str, tuple[Callable[[Tensor], Any], Callable[[], Any] | None]] = {}

    def add(
        self,
        name: str,
        shape: tuple[int, ...],
        device: Any,
        dtype: torch.dtype | None,
        init_fn: Callable[[Tensor], Any],
        get_rng_state_tracker: Callable[[], Any] | None = None,
    ) -> None:
        """Register a parameter."""
        parameter = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.register_parameter(name, parameter)
        self._drawn[name] = init_fn, get_rng_state_tracker

    def reset_parameters(self, defer_init: bool = False) -> None:
        """Draw every parameter anew; each becomes a new ``Parameter`` without marks."""
        if defer_init:
            return
        for name, parameter in list(self.named_parameters(recurse=False)):
            drawn: Tensor = parameter.detach()
            if drawn.device == torch.device("meta"):
                drawn = torch.empty_like(drawn, device="cuda")
            init_fn, tracker = self._drawn[name]
            if tracker is None:
                init_fn(drawn)
            else:
                region = getattr(self, "rng_tracker_name", None)
                with tracker().fork(region) if region else tracker().fork():
                    init_fn(drawn)
            setattr(self, name, nn.Parameter(drawn))

    def init_fp8_metadata(self, num_gemms: int = 1) -> None:
        """Nothing without 8-bit formats."""

    def get_extra_state(self) -> Tensor:
        """Empty without 8-bit formats, but always there."""
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        """Nothing to take up."""


def mark_tensor_parallel(tensor: Tensor, dim: int) -> None:
    """The marks by which Megatron knows a tensor that is divided."""
    assert not hasattr(tensor, "tensor_model_parallel")
    tensor.tensor_model_parallel, tensor.partition_dim, tensor.partition_stride = True, dim, 1
