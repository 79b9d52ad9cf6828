"""How long this process waits in collectives: a stopwatch around those of ``torch.distributed``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed

TIMED = (
    "all_gather", "all_gather_into_tensor", "all_gather_object", "all_reduce", "all_to_all",
    "all_to_all_single", "barrier", "broadcast", "broadcast_object_list", "gather", "recv",
    "reduce", "reduce_scatter", "reduce_scatter_tensor", "scatter", "send",
)  # fmt: skip
"""Functions of ``torch.distributed``. Not ``isend`` and ``irecv``: Megatron hands them on as
values that PyTorch compares with its own; the wait for what they started is timed."""

_installed = False
_running = False
_inside = False
_spans: list[tuple[Any, Any]] = []


def install() -> None:
    """Put the stopwatch around every collective and ``Work.wait``; a second call does nothing.

    Before Megatron is imported: its modules bind some of the names as they load. While no
    stopwatch runs a call costs one comparison.
    """
    global _installed
    if _installed:
        return
    for name in TIMED:
        setattr(torch.distributed, name, _timed(getattr(torch.distributed, name)))
    # Asynchronous collectives return at once: what is waited for is their end.
    torch.distributed.Work.wait = _timed(torch.distributed.Work.wait)  # type: ignore[method-assign]
    _installed = True


def start_clock() -> None:
    """Start from 0."""
    global _running
    _spans.clear()
    _running = True


def stop_clock() -> float:
    """Seconds within collectives since ``start_clock``, those of waiting for other ranks included.

    By events of the current stream: on a GPU the time for which it stood still, not the time that
    the call took.
    """
    global _running
    _running = False
    torch.cuda.synchronize()
    seconds = sum(began.elapsed_time(ended) for began, ended in _spans) / 1e3
    _spans.clear()
    return float(seconds)


def _timed(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def timed(*arguments: Any, **keywords: Any) -> Any:
        global _inside
        if not _running or _inside:  # a collective made of others counts once
            return function(*arguments, **keywords)
        began = torch.cuda.Event(enable_timing=True)
        ended = torch.cuda.Event(enable_timing=True)
        began.record()
        _inside = True
        try:
            return function(*arguments, **keywords)
        finally:
            _inside = False
            ended.record()
            _spans.append((began, ended))

    return timed
