"""Which number format a run computes in."""

from __future__ import annotations

import torch

from unimoe_mcore.runtime.capabilities import Choice, detect

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_HALF = (torch.bfloat16, torch.float16)


def attention_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which PyTorch's fused attention is fast for inputs of ``dtype``.

    Its backward pass on the CPU takes five times as long in bf16 as in fp32: 89 against 16 ms for
    48 sequences of 64 tokens, 9 heads of 64, one core of a Xeon with AMX.
    """
    return torch.float32 if dtype in _HALF and not detect().cuda.value else dtype


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
