from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Root mean square norm; the squares' mean in fp32."""

    def __init__(
        self,
        normalized_shape: int,
        eps: float = 1e-5,
        sequence_parallel: bool | None = None,
        params_dtype: torch.dtype | None = None,
        zero_centered_gamma: bool = False,
        *,
        device: Any = "cuda",
        dtype: torch.dtype | None = None,
    ) -> None:
        assert not zero_centered_gamma
        self.sequence_parallel = sequence_parallel
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(
            torch.empty(normalized_shape, device=device, dtype=params_dtype or dtype)
        )
        if torch.device(device).type != "meta":
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """One everywhere; memory where there is none."""
        weight = self.weight.detach()
        if weight.device.type == "meta":
            weight = torch.empty_like(weight, device="cuda")
        self.weight = nn.Parameter(nn.init.ones_(weight))
        if self.sequence_parallel is not None:
            self.weight.sequence_parallel = self.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        """Like ``x``."""
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


class LayerNorm(nn.Module):
    """Named by Megatron; not used by this project's layers."""

    def __init__(self, *arguments: object, **keywords: object) -> None:
        raise NotImplementedError("LayerNorm")
