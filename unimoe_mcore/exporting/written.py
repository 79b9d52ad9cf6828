"""Safetensors files as others write them, one tensor at a time in memory."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from unimoe_mcore.checkpoints.deferred import Deferred
from unimoe_mcore.checkpoints.files import write_text
from unimoe_mcore.checkpoints.shard_file import DTYPES


def write_safetensors(
    folder: Path, stem: str, tensors: Mapping[str, Deferred], dtype: torch.dtype, most: int
) -> list[str]:
    """Write tensors into ``stem.safetensors``, or into several files and an index.

    Args:
        dtype: of all of them.
        most: bytes of values in a file; a larger tensor has a file of its own.

    Returns:
        Names of the files.
    """
    groups = _divided(tensors, dtype, most)
    if len(groups) == 1:
        names = [f"{stem}.safetensors"]
    else:
        count = len(groups)
        names = [f"{stem}-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    for name, group in zip(names, groups, strict=True):
        _write(folder / name, {each: tensors[each] for each in group}, dtype)
    if len(groups) == 1:
        return names
    index = {
        "metadata": {"total_size": sum(_bytes(each, dtype) for each in tensors.values())},
        "weight_map": {
            each: name for name, group in zip(names, groups, strict=True) for each in group
        },
    }
    write_text(folder / f"{stem}.safetensors.index.json", json.dumps(index, indent=1))
    return [*names, f"{stem}.safetensors.index.json"]


def _bytes(tensor: Deferred, dtype: torch.dtype) -> int:
    return math.prod(tensor.shape) * dtype.itemsize


def _divided(tensors: Mapping[str, Deferred], dtype: torch.dtype, most: int) -> list[list[str]]:
    groups: list[list[str]] = [[]]
    filled = 0
    for name, tensor in tensors.items():
        size = _bytes(tensor, dtype)
        if groups[-1] and filled + size > most:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    return groups


def _write(path: Path, tensors: Mapping[str, Deferred], dtype: torch.dtype) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    for name, tensor in tensors.items():
        end = place + _bytes(tensor, dtype)
        header[name] = {
            "dtype": DTYPES[dtype],
            "shape": list(tensor.shape),
            "data_offsets": [place, end],
        }
        place = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors.items():
            value = tensor.read().to(dtype).contiguous()
            if tuple(value.shape) != tensor.shape:
                raise RuntimeError(f"{name} is {list(value.shape)}, not {list(tensor.shape)}")
            file.write(memoryview(value.view(-1).view(torch.uint8).numpy()))
        file.flush()
        os.fsync(file.fileno())
