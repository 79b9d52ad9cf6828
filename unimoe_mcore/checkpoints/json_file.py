"""JSON files from somewhere else: bounded, and with no name twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_object(path: Path, most: int) -> dict[str, Any]:
    """A file that holds one JSON object.

    Args:
        most: bytes that it may have.

    Raises:
        ValueError: if it is longer, or no such file.
        OSError: if it cannot be read.
    """
    with path.open("rb") as file:
        return parsed_object(file.read(most + 1), path.name, most)


def parsed_object(data: bytes, name: str, most: int) -> dict[str, Any]:
    """One JSON object.

    Args:
        name: what it is called in messages.

    Raises:
        ValueError: if it is longer than ``most`` bytes, or something else.
    """
    if len(data) > most:
        raise ValueError(f"{name} is longer than {most} bytes")
    try:
        found = json.loads(data, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is no JSON that can be read ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{name} is no JSON object")
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it has {next(n for n in names if names.count(n) > 1)!r:.60} twice")
    return found
