"""Safetensors files from somewhere else: the library reads them, after a look at their header.

The library refuses offsets that overlap, leave gaps or leave the file. It takes the last of two
tensors of one name, and a header of up to 100 MB: those are refused here.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from unimoe_mcore.checkpoints.deferred import Deferred
from unimoe_mcore.checkpoints.json_file import parsed_object
from unimoe_mcore.config.errors import UserError

MOST_HEADER = 1 << 24
"""Bytes of a header; Mixtral's thousand tensors take a tenth of a megabyte."""

FLOATING = ("F64", "F32", "F16", "BF16")


def read_safetensors(path: Path) -> dict[str, Deferred]:
    """The tensors of a file, by name; values are read when they are wanted, and then mapped.

    Raises:
        UserError: if it is no whole safetensors file, or larger than the bounds.
    """
    try:
        _check_header(path)
        with safe_open(str(path), framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {
                name: Deferred(
                    tuple(each.get_shape()),
                    partial(_values, path, name),
                    each.get_dtype() in FLOATING,
                )
                for name, each in slices.items()
            }
    except (SafetensorError, ValueError, OSError) as error:
        raise UserError(f"{path} is no whole safetensors file: {said(error)}.") from error


def said(error: Exception) -> str:
    """An error's message in one line, short, without a full stop."""
    return " ".join(str(error).split())[:300].rstrip(".")


def _check_header(path: Path) -> None:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > MOST_HEADER:
            raise ValueError(f"its header says it is {length} bytes long, over {MOST_HEADER}")
        parsed_object(file.read(length), "its header", MOST_HEADER)


def _values(path: Path, name: str) -> Tensor:
    """A tensor, mapped: the mapping goes when it does, so one at a time is in memory.

    Raises:
        UserError: if the file changed since its header was read.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            found: Tensor = file.get_tensor(name)
            return found
    except (SafetensorError, RuntimeError, OSError) as error:
        raise UserError(f"{name} in {path} cannot be read: {said(error)}.") from error
