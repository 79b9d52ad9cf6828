"""The most operations a second that a device does in matrix products: what MFU is a share of."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from unimoe_mcore.runtime.capabilities import detect
from unimoe_mcore.runtime.devices import device
from unimoe_mcore.runtime.precision import DTYPES
from unimoe_mcore.runtime.run_directory import machine

VENDOR: tuple[tuple[str, float], ...] = (
    ("B200", 2250e12),
    ("H200", 989.4e12),
    ("H800", 989.4e12),
    ("H100 PCIe", 756.5e12),
    ("H100 NVL", 835.5e12),
    ("H100", 989.4e12),
    ("A800", 312e12),
    ("A100", 312e12),
    ("L40S", 362e12),
)
"""Dense bf16 operations a second by part of the device's name, from NVIDIA's data sheets; the
first name that fits counts."""

_ROUNDS = 12


@dataclass(frozen=True)
class Peak:
    """Operations a second of one process's device.

    Attributes:
        operations: a second.
        source: where the number comes from, for the log.
    """

    operations: float
    source: str


def matrix_peak(precision: str, cache: Path) -> Peak:
    """The vendor's figure for a known GPU in bf16; else the best of some products, measured once.

    A measurement is kept in ``cache/peaks.json`` by device, threads, precision and PyTorch's
    version; delete that file to measure again (it was too low if other work ran beside it).

    Args:
        precision: ``bf16`` or ``fp32``.
        cache: folder for the measurement.
    """
    known = vendor_figure(_device_name()) if precision == "bf16" and detect().cuda.value else None
    if known is not None:
        return known
    path = cache / "peaks.json"
    key = f"{_device_name()}, {torch.get_num_threads()} threads, {precision}, {torch.__version__}"
    peaks = _read(path)
    if key not in peaks:
        peaks[key] = asdict(Peak(_measure(precision), f"measured: {key}"))
        cache.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text(json.dumps(peaks, indent=1), encoding="utf8")
        partial.replace(path)
    return Peak(**peaks[key])


def vendor_figure(name: str) -> Peak | None:
    """The data sheet's bf16 figure for a GPU's name; None for one that is not in the table."""
    for part, operations in VENDOR:
        if part in name:
            return Peak(operations, f"data sheet of {part}, dense bf16")
    return None


def _device_name() -> str:
    if detect().cuda.value:
        return torch.cuda.get_device_name()
    return str(machine()["cpu"])


def _read(path: Path) -> dict[str, dict[str, Any]]:
    try:
        peaks = json.loads(path.read_text(encoding="utf8"))
        return {key: asdict(Peak(**peak)) for key, peak in peaks.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _measure(precision: str) -> float:
    """Best of some square products, after one that is not counted."""
    size = 8192 if detect().cuda.value else 1024
    a = torch.ones(size, size, dtype=DTYPES[precision], device=device())
    best = 0.0
    for number in range(_ROUNDS + 1):
        began = time.perf_counter()
        torch.mm(a, a)
        torch.cuda.synchronize()
        if number:
            best = max(best, 2 * size**3 / (time.perf_counter() - began))
    return best
