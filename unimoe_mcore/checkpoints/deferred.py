"""Tensors that are read when they are wanted: a model is laid out by its shapes alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Deferred:
    """A tensor of which only the shape is held.

    Attributes:
        shape: its sizes.
        read: makes its values, anew each time.
        floating: whether they are floating-point numbers; quantised weights are not.
    """

    shape: tuple[int, ...]
    read: Callable[[], Tensor]
    floating: bool = True
