"""An export on disk: whole or not there."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from unimoe_mcore.checkpoints.artefact import publish
from unimoe_mcore.checkpoints.files import write_text
from unimoe_mcore.config.errors import UserError
from unimoe_mcore.exporting.exported import Exported
from unimoe_mcore.exporting.subject import Subject
from unimoe_mcore.exporting.tokenizer_files import NO_TEMPLATE, write_tokenizer
from unimoe_mcore.exporting.written import write_safetensors

README = "README.md"


@dataclass(frozen=True)
class Done:
    """What was written.

    Attributes:
        files: with weights.
        numbers: in them.
        left_out: what of the model is not there -> why.
    """

    files: list[str]
    numbers: int
    left_out: Mapping[str, str]


def check_absent(folder: Path) -> None:
    """Refuse a folder that is there.

    Raises:
        UserError: naming it.
    """
    if os.path.lexists(folder):
        raise UserError(f"{folder} exists: name another folder, or delete it.")


def write_export(
    folder: Path, subject: Subject, exported: Exported, dtype: torch.dtype, most: int
) -> Done:
    """Write an export; it is visible only when it is whole.

    Args:
        dtype: of the weights.
        most: bytes of values in a file.

    Raises:
        UserError: if the folder is there, or a source cannot be read.
    """
    check_absent(folder)
    folder = Path(os.path.abspath(folder))
    partial = folder.with_name(f".partial-{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        files: list[str] = []
        for stem, tensors in exported.tensors.items():
            files += write_safetensors(partial, stem, tensors, dtype, most)
        for name, facts in exported.objects.items():
            typed = {"torch_dtype": _name(dtype)} if name == "config.json" else {}
            write_text(partial / name, json.dumps({**facts, **typed}, indent=1))
        left_out = dict(exported.left_out)
        tokenizer = subject.tokenizer if exported.tokenizer else None
        if tokenizer and not write_tokenizer(partial, tokenizer, subject.language):
            left_out |= [NO_TEMPLATE]
        write_text(partial / README, readme(subject, exported, left_out, dtype))
        check_absent(folder)
        publish(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    numbers = sum(math.prod(t.shape) for group in exported.tensors.values() for t in group.values())
    return Done(files, numbers, left_out)


def readme(
    subject: Subject, exported: Exported, left_out: Mapping[str, str], dtype: torch.dtype
) -> str:
    """What the folder holds, how it is loaded, and what is not in it."""
    lines = [
        f"# {subject.name}",
        "",
        f"{exported.title}, {_name(dtype)}; of the run {subject.name} (stage {subject.kind}) after "
        f"{subject.step} steps, by `python -m unimoe_mcore.export`.",
        "",
        f"    {exported.use}",
        "",
    ]
    for note in exported.notes:
        lines += [note, ""]
    if exported.tokenizer:
        lines += [
            "Special tokens that a text spells out are special tokens to transformers; in training "
            "they were plain text. The media's markers are tokens without a meaning here.",
            "",
        ]
    if left_out:
        lines += ["Not in it:", "", *(f"- {what}: {why}" for what, why in left_out.items()), ""]
    return "\n".join(lines)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
