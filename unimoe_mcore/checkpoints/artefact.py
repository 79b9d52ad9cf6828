"""What a stage gives: a sealed folder of weights, its facts, and one digest per tensor."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from unimoe_mcore.checkpoints.store import ShardReader, write_text
from unimoe_mcore.config.errors import UserError

FORMAT = 1
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"


@dataclass(frozen=True)
class Manifest:
    """Facts of an artefact.

    Attributes:
        kind: the stage kind that gave it.
        hash: over names, shapes, dtypes and digests of all tensors (and the tokenizer's text):
            equal weights have equal hashes, whichever layout wrote them.
        stands_on: hash of the base that it belongs to; its own hash for a base.
        expert: the modality an expert artefact is specialised in.
        run: name of the run.
        language: shape of the language model (``LanguageConfig`` as a dict).
        towers: for every connector given: its ``TowerConfig`` as a dict.
        tensors: name -> shape, dtype, sha256 of the whole tensor's bytes.
    """

    kind: str
    hash: str
    stands_on: str
    expert: str
    run: str
    language: dict[str, Any]
    towers: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, dict[str, Any]] = field(default_factory=dict)
    format: int = FORMAT


def read_manifest(folder: Path, what: str) -> Manifest:
    """Facts of an artefact.

    Args:
        what: what the recipe calls it, for the message.

    Raises:
        UserError: if there is no artefact, or its manifest cannot be read.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise UserError(
            f"{what} is missing: there is no {path}; run the stage that gives it first."
        )
    try:
        raw = json.loads(path.read_text(encoding="utf8"))
        if raw.get("format") != FORMAT:
            raise UserError(f"{path} has format {raw.get('format')}, this version reads {FORMAT}.")
        return Manifest(**raw)
    except (TypeError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}.") from error


def seal(folder: Path, facts: Manifest) -> Manifest:
    """Compute the digests of a folder of shards and write its manifest; the last step of giving.

    Args:
        facts: everything but ``hash`` and ``tensors``; an empty ``stands_on`` becomes the hash.
    """
    reader = ShardReader(folder, verify=False)
    tensors = {}
    for name in sorted(reader.tensors):
        value = reader.read(name).contiguous()
        digest = hashlib.sha256(value.view(-1).view(dtype=torch.uint8).numpy()).hexdigest()
        tensors[name] = {
            "shape": list(value.shape),
            "dtype": str(value.dtype).removeprefix("torch."),
            "sha256": digest,
        }
    summary = hashlib.sha256(json.dumps(tensors, sort_keys=True).encode())
    if (folder / TOKENIZER).is_file():
        summary.update((folder / TOKENIZER).read_bytes())
    whole = summary.hexdigest()
    sealed = Manifest(
        **{
            **asdict(facts),
            "hash": whole,
            "stands_on": facts.stands_on or whole,
            "tensors": tensors,
        }
    )
    write_text(folder / MANIFEST, json.dumps(asdict(sealed), indent=1))
    return sealed


def publish(partial: Path, folder: Path) -> None:
    """Make a finished folder visible under its name in one step."""
    if folder.exists():
        shutil.rmtree(folder)
    partial.rename(folder)


def check_stands_on(part: Manifest, folder: Path, base: Manifest, base_folder: Path) -> None:
    """Refuse a part that was trained on another base.

    Raises:
        UserError: naming both bases.
    """
    if part.stands_on != base.hash:
        raise UserError(
            f"{folder} stands on base {part.stands_on[:12]}, but the recipe's base {base_folder} "
            f"is {base.hash[:12]}: retrain the part on this base or name the base it stands on."
        )
