"""What a stage gives: a sealed folder of weights, its facts, and one digest per tensor."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data_pipeline.shards.integrity import file_sha256
from unimoe_mcore.checkpoints.files import flush, write_text
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
        sources: what the run took -> hash (``unimoe_mcore.checkpoints.sources``).
        data: digest of the data it was trained on.
        lora: what the adapters among the tensors are (``LoRAConfig`` as a dict); empty where there
            are none: they may have been merged into the weights.
        steps: optimizer steps that it was trained for; 0 if that was not recorded.
        tensors: name -> shape, dtype, sha256 of the whole tensor's bytes.
        files: index files and tokenizer -> sha256; the indexes hold those of the weights.
    """

    kind: str
    hash: str
    stands_on: str
    expert: str
    run: str
    language: dict[str, Any]
    towers: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    data: str = ""
    lora: dict[str, Any] = field(default_factory=dict)
    steps: int = 0
    tensors: dict[str, dict[str, Any]] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
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
        if raw["format"] != FORMAT:
            raise UserError(f"{path} has format {raw['format']}, this version reads {FORMAT}.")
        manifest = Manifest(**raw)
    except (OSError, TypeError, ValueError, KeyError) as error:
        raise UserError(f"{path} cannot be read: {error}.") from error
    _check_files(folder, manifest)
    return manifest


def _check_files(folder: Path, manifest: Manifest) -> None:
    """Refuse indexes, tokenizer or tensors that are not those the manifest was sealed with."""
    present = {path.name for path in folder.glob("rank-*.json")}
    if present | {TOKENIZER} != set(manifest.files) | {TOKENIZER}:
        raise UserError(f"{folder} has other index files than its manifest lists: give it anew.")
    for name, digest in manifest.files.items():
        path = folder / Path(name).name
        if not path.is_file() or file_sha256(path) != digest:
            raise UserError(f"{path} is missing or damaged: its checksum is not the manifest's.")
    if _whole_hash(manifest.tensors, manifest.files.get(TOKENIZER, "")) != manifest.hash:
        raise UserError(f"{folder / MANIFEST} is damaged: its tensors do not make its hash.")


def _whole_hash(tensors: dict[str, dict[str, Any]], tokenizer: str) -> str:
    """Hash of names, shapes, types and digests of all tensors, and of the tokenizer's digest."""
    text = json.dumps([tensors, tokenizer], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def seal(
    folder: Path, facts: Manifest, tensors: dict[str, dict[str, Any]] | None = None
) -> Manifest:
    """Compute the digests of a folder of shards and write its manifest; the last step of giving.

    Args:
        facts: everything but ``hash`` and ``tensors``; an empty ``stands_on`` becomes the hash.
        tensors: the tensors as the manifest lists them, if who wrote them has; else they are read.
    """
    tensors = _listed(folder) if tensors is None else dict(sorted(tensors.items()))
    names = [path.name for path in sorted(folder.glob("rank-*.json"))]
    names += [TOKENIZER] if (folder / TOKENIZER).is_file() else []
    files = {name: file_sha256(folder / name) for name in names}
    whole = _whole_hash(tensors, files.get(TOKENIZER, ""))
    sealed = Manifest(
        **{
            **asdict(facts),
            "hash": whole,
            "stands_on": facts.stands_on or whole,
            "tensors": tensors,
            "files": files,
        }
    )
    write_text(folder / MANIFEST, json.dumps(asdict(sealed), indent=1))
    return sealed


def _listed(folder: Path) -> dict[str, dict[str, Any]]:
    """Shape, type and digest of every tensor of a folder of shards."""
    import torch

    from unimoe_mcore.checkpoints.store import ShardReader  # imports Megatron; readers need not

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
    return tensors


def publish(partial: Path, folder: Path) -> None:
    """Make a finished folder visible under its name; a kill leaves the old or the new one whole."""
    old = folder.with_name(f".old-{folder.name}")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    flush(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


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
