"""Which device this process runs on: asked here, and nowhere else."""

from __future__ import annotations

import os
import resource
import sys

import torch

from unimoe_mcore.runtime import collectives, without_te
from unimoe_mcore.runtime.capabilities import detect
from unimoe_mcore.runtime.quiet import silence_import_remarks

_prepared = False


def prepare_device() -> None:
    """Make this process ready for Megatron; call it before ``megatron`` is imported.

    With a CUDA device: make the one of this local rank current. Without: lend Megatron the names
    it needs (``runtime.cpu``) and use one thread, or as many as ``OMP_NUM_THREADS`` says. On both:
    what Megatron lacks there (``runtime.without_te``). A second call does nothing. An entry
    point calls it at module level: the checkpoint worker is a spawned process that imports the
    entry point's module, and needs it as well.

    Raises:
        RuntimeError: if Megatron is imported already.
    """
    global _prepared
    if _prepared:
        return
    if "megatron.core" in sys.modules:
        raise RuntimeError("megatron.core was imported before prepare_device()")
    silence_import_remarks()
    found = detect()
    collectives.install()
    if found.cuda.value:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    else:
        from unimoe_mcore.runtime import cpu

        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        cpu.install()
    without_te.install(
        keep_norms=found.transformer_engine.value, keep_adam=found.adam.value != "torch"
    )
    _prepared = True


def device() -> torch.device:
    """The device of this process: the current CUDA device, or the CPU."""
    if detect().cuda.value:
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def backend() -> str:
    """The backend of ``torch.distributed``: ``nccl`` between CUDA devices, else ``gloo``."""
    return "nccl" if detect().cuda.value else "gloo"


def peak_memory() -> int:
    """Most memory used so far, bytes: allocated on the CUDA device, or resident of this process."""
    if detect().cuda.value:
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def host_memory(size: int) -> torch.Tensor:
    """Host memory of ``size`` bytes, ``[size]`` uint8, that the device copies to at full speed."""
    return torch.empty(size, dtype=torch.uint8, pin_memory=detect().cuda.value)
