"""The modalities: each file of this folder is one, and is found without being listed.

Its name is the file's; the file holds ``MODALITY``, what the system must know about it
(``data_pipeline.reading.modality``). ``docs/adding_a_modality.md`` adds one.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from data_pipeline.reading.modality import Modality

FIRST = ("image", "video", "speech", "audio")
"""Those that every tokenizer has a marker for, in the order in which combinations are named."""

_FOUND = sorted(module.name for module in pkgutil.iter_modules(__path__))

MODALITIES = (*FIRST, *(name for name in _FOUND if name not in FIRST))
"""Every modality but text: others behind the first ones, so that what was written stays true."""


@cache
def modality(name: str) -> Modality:
    """What the system must know about one of ``MODALITIES``; its decoders are imported only now."""
    found: Modality = importlib.import_module(f"{__name__}.{name}").MODALITY
    return found


def tower_modalities(tower: str) -> tuple[str, ...]:
    """Modalities that the tower of a name takes: its own, and the image tower also video."""
    return tuple(name for name in MODALITIES if tower_of(name) == tower)


def tower_of(group: str) -> str:
    """The tower that takes a modality; of text, its own name."""
    return modality(group).tower or group if group in MODALITIES else group
