"""``.bin`` files of ``torch.save``: zip archives with a pickle, of which no code is ever run.

The archive is looked at first: its members lie in it as they are (no compression, so no zip bomb),
apart from each other, and are those that ``torch.save`` writes. Then PyTorch's restricted reader
(``weights_only``) makes tensors of it, mapped from the file.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unimoe_mcore.checkpoints.deferred import Deferred
from unimoe_mcore.checkpoints.facts import shown
from unimoe_mcore.checkpoints.safetensors_file import said
from unimoe_mcore.config.errors import UserError

MOST_MEMBERS = 1 << 17
MOST_PICKLE = 1 << 26
"""Bytes of ``data.pkl``; that of a thousand tensors takes a tenth of a megabyte."""
MOST_DIRECTORY = 1 << 24
"""Bytes of the archive's list of members."""

_MEMBER = re.compile(
    r"[^/\\]+/(data\.pkl|data/[0-9]+|version|byteorder|\.data/serialization_id|"
    r"\.format_version|\.storage_alignment)"
)
_HEADER = 30
"""Bytes of a member's own header, without its name."""

INSTEAD = "save it again as safetensors where you trust it (model.save_pretrained)"


def read_torch(path: Path) -> dict[str, Deferred]:
    """The tensors of a file, by name; values are read when they are wanted, and then mapped.

    Raises:
        UserError: if it is no such archive, or holds anything but tensors.
    """
    try:
        check_archive(path)
    except (ValueError, OSError, zipfile.BadZipFile, NotImplementedError) as error:
        raise UserError(f"{path} is no file of torch.save that can be read: {said(error)}.") from (
            error
        )
    found = {}
    for name, value in _loaded(path).items():
        if not _plain(value):
            raise UserError(f"{path} cannot be used: {shown(name)} is no plain tensor; {INSTEAD}.")
        found[name] = Deferred(
            tuple(value.shape), partial(_values, path, name), value.is_floating_point()
        )
    return found


def check_archive(path: Path) -> None:
    """Refuse what ``torch.save`` does not write, before any of it is unpacked.

    Raises:
        ValueError: saying what.
        zipfile.BadZipFile: if it is no archive.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":
            raise ValueError(f"it is no zip archive (a form older than PyTorch 1.6?); {INSTEAD}")
        _check_directory(file, size)
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    for member in members:
        if not _MEMBER.fullmatch(member.filename):
            raise ValueError(f"its member {shown(member.filename)} is not known")
        if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
            raise ValueError(f"its member {shown(member.filename)} is compressed")
        if member.filename.endswith("/data.pkl") and member.file_size > MOST_PICKLE:
            raise ValueError(f"its data.pkl is longer than {MOST_PICKLE} bytes")
    names = [member.filename for member in members]
    if len(set(names)) < len(names) or len({name.split("/")[0] for name in names}) != 1:
        raise ValueError("it has a member twice, or several folders")
    for one, other in pairwise(sorted(members, key=lambda member: member.header_offset)):
        if one.header_offset + _HEADER + one.file_size > other.header_offset:
            raise ValueError(f"{shown(one.filename)} and {shown(other.filename)} share bytes")


def _check_directory(file: Any, size: int) -> None:
    """Refuse a long list of members before it is read: the end of the archive says how long."""
    end = zipfile._EndRecData(file)  # type: ignore[attr-defined]
    if end is None:
        raise ValueError("it is cut off: the list of its members is missing")
    count, length = end[4], end[5]
    if count > MOST_MEMBERS or length > min(size, MOST_DIRECTORY):
        raise ValueError(f"its list of members is too long ({count} members, {length} bytes)")


def _loaded(path: Path) -> dict[str, Any]:
    """What the file holds, mapped.

    Raises:
        UserError: if that is not a dictionary of named values, or needs code to be made.
    """
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        what = shown(named[1]) if named else "something else than tensors"
        raise UserError(f"{path} is refused: its pickle asks for {what}; {INSTEAD}.") from error
    except Exception as error:  # the reader raises whatever a broken pickle leads it to
        raise UserError(f"{path} cannot be read: {said(error)}; {INSTEAD}.") from error
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise UserError(f"{path} holds no named tensors; {INSTEAD}.")
    return found


def _plain(value: Any) -> bool:
    """Whether it is a tensor that lies in the file as it is, all of it."""
    return (
        isinstance(value, Tensor)
        and type(value) in (Tensor, torch.nn.Parameter)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not value.is_quantized
        and value.numel() * value.element_size() <= value.untyped_storage().nbytes()
    )


def _values(path: Path, name: str) -> Tensor:
    """A tensor, mapped; the file's pickle is read again, so that nothing else stays in memory."""
    found = _loaded(path).get(name)
    if found is None or not _plain(found):
        raise UserError(f"{name} in {path} cannot be read: the file changed meanwhile.")
    value: Tensor = found.detach()
    return value
