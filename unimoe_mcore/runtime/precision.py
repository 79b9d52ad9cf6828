"""Which number format a run computes in."""

from __future__ import annotations

import torch

from unimoe_mcore.runtime.capabilities import Choice, detect

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def choose_precision(wanted: str) -> Choice[str]:
    """``bf16`` or ``fp32`` as the recipe says; ``auto`` takes what this machine is fast in.

    A CPU without bf16 instructions multiplies bf16 matrices many times slower than fp32 ones
    (``benchmarks/precision.py``), so that there ``auto`` means fp32.
    """
    if wanted != "auto":
        return Choice(wanted, "the recipe says so")
    if detect().cuda.value:
        return Choice("bf16", "a CUDA device")
    if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported():
        return Choice("bf16", "the CPU has bf16 instructions")
    return Choice("fp32", "this CPU has no bf16 instructions and is far slower in bf16")
