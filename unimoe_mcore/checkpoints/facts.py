"""What a published model says of itself, as facts of the right type, or a reason why not."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

type Facts = Mapping[str, Any]


def shown(value: Any) -> str:
    """A value from a file in a message: short, and in one line."""
    said = value if isinstance(value, str) and value.isprintable() else repr(value)
    return said if len(said) <= 60 else f"{said[:57]}..."


def text(facts: Facts, name: str, default: str | None = None) -> str:
    """A text.

    Raises:
        ValueError: if it is not there, or none.
    """
    value = _there(facts, name, default)
    if not isinstance(value, str):
        raise ValueError(f"{name} is {shown(value)}, no text")
    return value


def number(facts: Facts, name: str, default: float | None = None) -> float:
    """A number, not infinite.

    Raises:
        ValueError: if it is not there, or none.
    """
    value = _there(facts, name, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} is {shown(value)}, no number")
    if not math.isfinite(value):
        raise ValueError(f"{name} is {shown(value)}, no finite number")
    return value


def positive(facts: Facts, name: str, default: float | None = None) -> float:
    """A number greater than 0.

    Raises:
        ValueError: if it is not there, or none.
    """
    value = number(facts, name, default)
    if not value > 0:
        raise ValueError(f"{name} is {shown(value)}, no number greater than 0")
    return float(value)


def truth(facts: Facts, name: str, default: bool | None = None) -> bool:
    """True or false.

    Raises:
        ValueError: if it is not there, or neither.
    """
    value = _there(facts, name, default)
    if not isinstance(value, bool):
        raise ValueError(f"{name} is {shown(value)}, neither true nor false")
    return value


def size(facts: Facts, name: str, default: int | None = None) -> int:
    """A whole number from 1 on.

    Raises:
        ValueError: if it is not there, or none.
    """
    value = number(facts, name, default)
    if not 1 <= value < 2**31 or value != int(value):
        raise ValueError(f"{name} is {shown(value)}, no whole number from 1 on")
    return int(value)


def listed[T](facts: Facts, name: str, kind: type[T]) -> list[T]:
    """A list of texts or whole numbers.

    Raises:
        ValueError: if it is not there, or none.
    """
    value = _there(facts, name, None)
    if not isinstance(value, list) or not all(type(each) is kind for each in value):
        raise ValueError(f"{name} is no list of {kind.__name__}")
    return value


def _there(facts: Facts, name: str, default: Any) -> Any:
    value = facts.get(name, default)
    if value is None:
        raise ValueError(f"it lacks {name}")
    return value
