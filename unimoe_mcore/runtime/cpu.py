"""Lends Megatron-Core 0.19.2 the ``torch.cuda`` names it insists on, over gloo.

Megatron's code is "cuda" code. Where there is no CUDA device, the functions below make its names
mean the CPU: one function per reason, each saying which line of Megatron needs it and what happens
without. ``runtime.devices.prepare_device`` imports this file on such a machine and never elsewhere.
Line numbers are those of megatron-core 0.19.2, which the project pins: the patches touch names that
Megatron does not promise to keep.

What is missing because of Transformer Engine, not because of CUDA, is in ``runtime.without_te``.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed
import torch.utils._device

CPU = torch.device("cpu")

FACTORIES = (
    "arange", "as_tensor", "empty", "empty_like", "full", "full_like", "linspace", "ones",
    "ones_like", "rand", "randint", "randn", "randperm", "tensor", "zeros", "zeros_like",
)  # fmt: skip
"""Functions of ``torch`` that Megatron calls with ``device="cuda"``."""

_installed = False


class Stream:
    """A CUDA stream on the CPU: one queue, worked off in order, never behind."""

    cuda_stream = 0

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def wait_stream(self, stream: Any) -> None:
        """Nothing to wait for."""

    def wait_event(self, event: Any) -> None:
        """Nothing to wait for."""

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def record_event(self, event: Event | None = None) -> Event:
        """Return ``event`` (or a new one), stamped with the present time."""
        event = event or Event()
        event.record(self)
        return event


class Event:
    """A CUDA event on the CPU: a point in time, always in the past."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self._seconds = time.perf_counter()

    def record(self, stream: Any = None) -> None:
        """Stamp the event with the present time."""
        self._seconds = time.perf_counter()

    def wait(self, stream: Any = None) -> None:
        """Nothing to wait for."""

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def query(self) -> bool:
        """Whether the event has happened: always."""
        return True

    def elapsed_time(self, later: Event) -> float:
        """Milliseconds from this event to ``later``."""
        return (later._seconds - self._seconds) * 1e3


def patch_compile() -> None:
    """P0. Switch ``torch.compile`` off before Megatron decorates 57 functions with it.

    ``jit.py:25``: ``jit_fuser`` is ``torch.compile``. Without: the first call of any of them
    compiles C++ (tens of seconds, and an error where there is no compiler).
    """
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # read when torch._dynamo is imported
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None:
        _lend(dynamo.config, disable=True)


def patch_nccl_names() -> None:
    """P10. Give gloo wherever the name ``nccl`` is written out.

    ``bridge_communicator.py:199``, ``colocated_communicator.py:93`` pass ``backend="nccl"``.
    Without: ``ValueError: ProcessGroupNCCL is only supported with GPUs``.
    """

    def gloo_for_nccl(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapped(*arguments: Any, **keywords: Any) -> Any:
            if arguments and arguments[0] == "nccl":
                arguments = ("gloo", *arguments[1:])
            if keywords.get("backend") == "nccl":
                keywords["backend"] = "gloo"
                keywords.pop("pg_options", None)  # NCCL's own
            return function(*arguments, **keywords)

        return wrapped

    for name in ("init_process_group", "new_group", "new_subgroups_by_enumeration"):
        lent = {name: gloo_for_nccl(getattr(torch.distributed, name))}
        _lend(torch.distributed, **lent)
        _lend(torch.distributed.distributed_c10d, **lent)


def patch_current_device() -> None:
    """P1. The current CUDA device is the CPU, and there is one.

    ``tensor_parallel/layers.py:1000``, ``mappings.py:95``, ``param_and_grad_buffer.py:1162`` ...
    allocate on ``torch.cuda.current_device()``; ``async_utils.py:565`` takes a rank modulo
    ``device_count()``. Without: ``RuntimeError: Found no NVIDIA driver on your system``, and
    ``ZeroDivisionError`` in the checkpoint worker.
    """
    _lend(
        torch.cuda,
        current_device=lambda: CPU,
        device_count=lambda: 1,
        set_device=lambda device: None,
    )


def patch_streams() -> None:
    """P2. Streams and events that are always done.

    ``token_dispatcher.py:469`` makes a stream, ``param_and_grad_buffer.py:632`` waits for one,
    ``timers.py:152`` synchronises. Without: ``Found no NVIDIA driver on your system``.
    """
    stream = Stream()
    _lend(
        torch.cuda,
        Stream=Stream,
        Event=Event,
        current_stream=lambda device=None: stream,
        default_stream=lambda device=None: stream,
        stream=lambda stream: contextlib.nullcontext(),
        synchronize=lambda device=None: None,
    )


def patch_cuda_rng() -> None:
    """P3, first half. ``torch.cuda``'s generator is the CPU's.

    ``tensor_parallel/random.py:303`` seeds and reads it for every entry of the RNG tracker.
    Without: ``Found no NVIDIA driver on your system`` as soon as seeds are set.
    """

    def get_state(device: Any = None) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(state: torch.Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)

    _lend(torch.cuda, get_rng_state=get_state, set_rng_state=set_state)
    _lend(torch.cuda.random, get_rng_state=get_state, set_rng_state=set_state)
    seed = torch.random.default_generator.manual_seed
    _lend(torch.cuda, manual_seed=seed, manual_seed_all=seed)


def patch_device_strings() -> None:
    """P4. ``device="cuda"`` and ``.cuda()`` mean the CPU.

    ``optimizer.py:690``, ``clip_grads.py:96``, ``schedules.py:749``, ``exchange_utils.py:103``,
    ``transformer/utils.py:39`` ... write the device out. Without: ``Found no NVIDIA driver on your
    system``.
    """
    # Fill torch's cached set of factories with the originals first, or `with torch.device("meta")`
    # no longer recognises them.
    torch.utils._device._device_constructors()

    def on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapped(*arguments: Any, **keywords: Any) -> Any:
            if _is_cuda(keywords.get("device")):
                keywords["device"] = CPU
            return function(*arguments, **keywords)

        return wrapped

    _lend(torch, **{name: on_cpu(getattr(torch, name)) for name in FACTORIES})
    _lend(torch.Tensor, cuda=lambda tensor, *_, **__: tensor)


def patch_tensor_type() -> None:
    """P5. ``Tensor.type()`` of a CPU tensor answers ``torch.cuda.FloatTensor`` and so on.

    ``optimizer.py:1009``, ``distrib_optimizer.py:401``, ``clip_grads.py:174`` sort parameters by
    that string. Without: ``TypeError: Wrapped parameters must be one of torch.cuda.FloatTensor``.
    """
    original = torch.Tensor.type

    @functools.wraps(original)
    def tensor_type(tensor: torch.Tensor, *arguments: Any, **keywords: Any) -> Any:
        if arguments and isinstance(arguments[0], str):  # x.type(y.type()) must still be a cast
            arguments = (arguments[0].replace("torch.cuda.", "torch.", 1), *arguments[1:])
        answer = original(tensor, *arguments, **keywords)
        if isinstance(answer, str) and tensor.device.type == "cpu":
            return answer.replace("torch.", "torch.cuda.", 1)
        return answer

    _lend(torch.Tensor, type=tensor_type)


def patch_rng_tracker() -> None:
    """P3, second half. Megatron's RNG tracker reads and writes the CPU's generator.

    ``tensor_parallel/random.py:143``. Without it nothing fails: setting a state is queued until
    CUDA is initialised, that is for ever, and every fork of the tracker draws from one sequence.
    """
    from megatron.core.tensor_parallel import random

    def get_state(device: Any = "cuda", clone: bool = False, graph_safe: bool = False) -> Any:
        return torch.get_rng_state()

    def set_state(state: torch.Tensor, device: Any = -1, graph_safe: bool = False) -> None:
        torch.set_rng_state(state)

    _lend(random, _get_cuda_rng_state=get_state, _set_cuda_rng_state=set_state)


def patch_rng_warning() -> None:
    """P3c. Drop one log line: host and "device" share a generator here, so it is always true.

    ``tensor_parallel/random.py:338`` warns ``CPU RNG state changed within GPU RNG context``.
    Without: that line for every layer of every model.
    """

    def is_news(record: logging.LogRecord) -> bool:
        return "CPU RNG state changed" not in record.getMessage()

    logging.getLogger("megatron.core.tensor_parallel.random").addFilter(is_news)


def patch_moe_splits() -> None:
    """P6. The all-to-all's split sizes become numpy arrays, though they are on the CPU already.

    ``moe_utils.py:1184`` converts only what ``is_cuda``; ``token_dispatcher.py:927`` relies on it.
    Without, under expert parallelism: ``TypeError: all_to_all_single(): incompatible function
    arguments``.
    """
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    def move(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    _lend(moe_utils, maybe_move_tensor_to_cpu=move)
    _lend(token_dispatcher, maybe_move_tensor_to_cpu=move)


def patch_uneven_gather() -> None:
    """P8. Gather and reduce-scatter of unequal parts by way of all-to-all.

    ``mappings.py:155,194``: NCCL takes lists of unequal tensors, gloo does not. Only expert
    parallelism together with expert tensor parallelism comes here. Without:
    ``ProcessGroupGloo::allgather: invalid tensor size at index 1``.
    """
    from megatron.core.tensor_parallel import mappings

    gather, reduce_scatter = (
        mappings._gather_along_first_dim,
        mappings._reduce_scatter_along_first_dim,
    )

    def uneven_gather(
        part: torch.Tensor,
        group: Any,
        output_split_sizes: Any = None,
        use_global_buffer: bool = False,
    ) -> torch.Tensor:
        if output_split_sizes is None or group.size() == 1:
            return gather(part, group, output_split_sizes, use_global_buffer)
        sizes = [int(size) for size in output_split_sizes]
        whole = part.new_empty((sum(sizes), *part.shape[1:]))
        copies = torch.cat([part.contiguous()] * group.size())
        sent = [part.shape[0]] * group.size()
        torch.distributed.all_to_all_single(whole, copies, sizes, sent, group=group)
        return whole

    def uneven_reduce_scatter(
        whole: torch.Tensor,
        group: Any,
        input_split_sizes: Any = None,
        use_global_buffer: bool = False,
    ) -> torch.Tensor:
        if input_split_sizes is None or group.size() == 1:
            return reduce_scatter(whole, group, input_split_sizes, use_global_buffer)
        sizes = [int(size) for size in input_split_sizes]
        mine = sizes[group.rank()]
        parts = whole.new_empty((mine * group.size(), *whole.shape[1:]))
        received = [mine] * group.size()
        torch.distributed.all_to_all_single(parts, whole.contiguous(), received, sizes, group=group)
        return parts.view(group.size(), mine, *whole.shape[1:]).sum(0)

    _lend(
        mappings,
        _gather_along_first_dim=uneven_gather,
        _reduce_scatter_along_first_dim=uneven_reduce_scatter,
    )


PATCHES: tuple[Callable[[], None], ...] = (
    # Names of torch, which Megatron's modules may bind as they are imported,
    patch_compile,
    patch_nccl_names,
    patch_current_device,
    patch_streams,
    patch_cuda_rng,
    patch_device_strings,
    patch_tensor_type,
    # then names of Megatron's own.
    patch_rng_tracker,
    patch_rng_warning,
    patch_moe_splits,
    patch_uneven_gather,
)
"""All patches, in the order in which they are applied."""


def install() -> None:
    """Apply every patch, once; a second call does nothing.

    Raises:
        RuntimeError: if there is a CUDA device (the patches would take it away from Megatron), or
            if Megatron was imported before (its modules hold the names as they were).
    """
    global _installed
    if _installed:
        return
    if torch.cuda.is_available():
        raise RuntimeError("runtime.cpu must not be installed where there is a CUDA device")
    if "megatron.core" in sys.modules:
        raise RuntimeError("megatron.core was imported before prepare_device()")
    for patch in PATCHES:
        patch()
    _installed = True


def _lend(owner: Any, **names: Any) -> None:
    """Set attributes of a module or class that is not ours."""
    for name, value in names.items():
        setattr(owner, name, value)


def _is_cuda(device: Any) -> bool:
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, torch.device) and device.type == "cuda"
