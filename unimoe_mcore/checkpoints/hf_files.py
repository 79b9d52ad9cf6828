"""The weight files of a published model's folder, in one or many pieces."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from unimoe_mcore.checkpoints.deferred import Deferred
from unimoe_mcore.checkpoints.facts import shown
from unimoe_mcore.checkpoints.importing import some
from unimoe_mcore.checkpoints.json_file import read_object
from unimoe_mcore.checkpoints.safetensors_file import read_safetensors
from unimoe_mcore.checkpoints.torch_file import read_torch
from unimoe_mcore.config.errors import UserError

MOST_INDEX = 1 << 25
"""Bytes of an index."""
MOST_FILES = 4096
_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class _Form:
    """How weights are stored: in one file of this name, or in those that an index names."""

    whole: str
    read: Callable[[Path], dict[str, Deferred]]

    @property
    def index(self) -> str:
        return f"{self.whole}.index.json"


FORMS = (_Form("model.safetensors", read_safetensors), _Form("pytorch_model.bin", read_torch))
"""The first that a folder has is read."""


def read_weights(folder: Path) -> tuple[dict[str, Deferred], list[Path]]:
    """All tensors of a folder by their names there, and the files that they are in.

    Raises:
        UserError: if there are none, a file is missing, damaged or outside of the folder, or the
            index is not about them.
    """
    for form in FORMS:
        if (folder / form.whole).is_file():
            return form.read(folder / form.whole), [folder / form.whole]
        if (folder / form.index).is_file():
            return _sharded(folder, form)
    known = ", ".join(name for form in FORMS for name in (form.whole, form.index))
    raise UserError(f"There are no weights in {folder}: it has none of {known}.")


def _sharded(folder: Path, form: _Form) -> tuple[dict[str, Deferred], list[Path]]:
    index = folder / form.index
    try:
        places = _places(read_object(index, MOST_INDEX), index)
    except (ValueError, OSError) as error:
        raise UserError(f"{index} cannot be used: {error}.") from error
    names = list(dict.fromkeys(places.values()))
    for name in names:
        if not (folder / name).is_file():
            raise UserError(f"{index} names {name}, which is missing: fetch it again.")
    found: dict[str, Deferred] = {}
    for name in names:
        held = form.read(folder / name)
        listed = {tensor for tensor, place in places.items() if place == name}
        problems = [f"{tensor} is not in {name}" for tensor in sorted(listed - held.keys())]
        problems += [f"{tensor} is in {name}, unlisted" for tensor in sorted(held.keys() - listed)]
        if problems:
            raise UserError(f"{index} is not about its files: {some(problems)}.")
        found |= held
    return found, [index, *(folder / name for name in names)]


def _places(facts: Mapping[str, object], index: Path) -> dict[str, str]:
    """Tensor -> file.

    Raises:
        ValueError: if a file's name is none, or leads out of the folder.
    """
    places = facts.get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ValueError("it has no weight_map")
    for name in places.values():
        if not isinstance(name, str) or not _PLAIN.fullmatch(name):
            raise ValueError(f"it names {shown(name)}, which is no file of the folder")
    if len(set(places.values())) > MOST_FILES:
        raise ValueError(f"it names more than {MOST_FILES} files")
    return places
