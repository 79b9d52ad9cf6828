"""Fill a stage's model from the runs that its recipe names, and refuse what does not fit."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from unimoe_mcore.checkpoints.artefact import Manifest, check_stands_on, read_manifest
from unimoe_mcore.checkpoints.store import ShardReader, sharded_tensors
from unimoe_mcore.config.errors import UserError
from unimoe_mcore.config.recipe import Recipe
from unimoe_mcore.config.stage import OWN_MLP
from unimoe_mcore.model.assembly import origin
from unimoe_mcore.model.initialise import initialise
from unimoe_mcore.model.unimoe import UniMoEModel


@dataclass
class Sources:
    """The artefacts a stage takes its weights from, checked against each other.

    Attributes:
        base: facts of the base; None for the base stage itself.
        base_folder: where it is.
        experts: folder per expert, None for the base's own MLP.
        connectors: tower -> folder; a tower that is not here starts fresh.
    """

    base: Manifest | None = None
    base_folder: Path = Path()
    experts: list[Path | None] = field(default_factory=list)
    connectors: dict[str, Path] = field(default_factory=dict)


def find_sources(recipe: Recipe) -> Sources:
    """Read the manifests of all that the recipe names and check that they fit together.

    Raises:
        UserError: a part is missing, stands on another base, has another shape or tower, or two
            runs could give a connector and the recipe does not choose.
    """
    stage = recipe.stage
    if stage.kind == "base":
        return Sources()
    base_folder = Path(stage.base)
    base = read_manifest(base_folder, "The base (stage.base)")
    if base.kind != "base":
        raise UserError(f"stage.base={base_folder} is a {base.kind} artefact, not a base.")
    _same_shape(recipe, base, base_folder)
    sources = Sources(base, base_folder)
    for number, entry in enumerate(stage.experts):
        sources.experts.append(None if entry == OWN_MLP else Path(entry))
        if entry != OWN_MLP:
            manifest = _part(recipe, Path(entry), f"Expert {number} (stage.experts)", base)
            if manifest.kind != "expert":
                raise UserError(f"stage.experts[{number}]={entry} is no expert artefact.")
    sources.connectors = _connector_sources(recipe, base)
    return sources


def _part(recipe: Recipe, folder: Path, what: str, base: Manifest) -> Manifest:
    manifest = read_manifest(folder, what)
    check_stands_on(manifest, folder, base, Path(recipe.stage.base))
    return manifest


def _same_shape(recipe: Recipe, base: Manifest, folder: Path) -> None:
    wanted = asdict(recipe.model.language)
    differing = [k for k, v in wanted.items() if base.language.get(k) != v]
    if differing:
        words = ", ".join(f"{k}={base.language.get(k)} (recipe: {wanted[k]})" for k in differing)
        raise UserError(f"The base {folder} has another shape than model.language: {words}.")


def _connector_sources(recipe: Recipe, base: Manifest) -> dict[str, Path]:
    """A connector comes from where the recipe says, else from its own modality's expert run,
    else from ``stage.start``.
    """
    stage, chosen = recipe.stage, {}
    start = _part(recipe, Path(stage.start), "stage.start", base) if stage.start else None
    specialised: dict[str, list[str]] = {}
    for entry in stage.experts:
        if entry != OWN_MLP:
            specialised.setdefault(read_manifest(Path(entry), entry).expert, []).append(entry)
    for tower, config in recipe.model.towers.items():
        candidates = sorted(set(specialised.get(tower, [])))
        folder = stage.connectors.get(tower) or (candidates[0] if candidates else stage.start)
        if not folder:
            continue
        if len(candidates) > 1 and tower not in stage.connectors:
            raise UserError(
                f"The {tower} connector could come from {' or '.join(candidates)}: "
                f"choose one with stage.connectors.{tower}=FOLDER."
            )
        given = start if folder == stage.start and start else None
        given = given or _part(recipe, Path(folder), f"The {tower} connector", base)
        if tower not in given.towers:
            raise UserError(
                f"{folder} has no {tower} connector (it has {', '.join(given.towers) or 'none'}): "
                f"name another run with stage.connectors.{tower}=FOLDER."
            )
        if given.towers[tower] != asdict(config):
            differing = _differing(given.towers[tower], asdict(config))
            raise UserError(
                f"The {tower} tower of {folder} differs from the recipe's: {differing}."
            )
        chosen[tower] = Path(folder)
    return chosen


def _differing(there: dict[str, Any], here: dict[str, Any], prefix: str = "") -> str:
    words = []
    for key in here:
        if isinstance(here[key], dict):
            words.append(_differing(there.get(key, {}), here[key], f"{prefix}{key}."))
        elif there.get(key) != here[key]:
            words.append(f"{prefix}{key}={there.get(key)} there, {here[key]} in the recipe")
    return ", ".join(word for word in words if word)


def load_sources(model: UniMoEModel, sources: Sources, recipe: Recipe) -> None:
    """Fill every tensor of this rank's model chunk.

    Raises:
        UserError: if a source lacks a tensor or has it in another shape.
    """
    if sources.base is None:
        return
    base = ShardReader(sources.base_folder)
    connectors = {tower: ShardReader(folder) for tower, folder in sources.connectors.items()}
    folders = {folder for folder in sources.experts if folder is not None}
    experts = {folder: ShardReader(folder) for folder in folders}
    for tensor in sharded_tensors(model.sharded_state_dict()):
        source = origin(tensor.key)
        if source.kind == "base":
            base.fill(tensor)
        elif source.kind == "experts":
            folder = sources.experts[int(tensor.global_offset[0])]
            _fill_expert(tensor, base if folder is None else experts[folder], source.name)
        elif source.kind == "connector":
            if source.tower in connectors:
                connectors[source.tower].fill(tensor)
        else:
            initialise(tensor, recipe.trainer.seed, recipe.model.language.init_std)


def _fill_expert(tensor: ShardedTensor, reader: ShardReader, dense: str) -> None:
    """Fill one expert's slice ``[1, out, in]`` of the stack from a dense weight ``[out, in]``."""
    stored = reader.tensors.get(dense)
    if stored is None:
        raise UserError(f"{reader.folder} has no tensor {dense}: it gives no MLP for that block.")
    if stored.shape != tuple(tensor.global_shape[1:]):
        raise UserError(
            f"{dense} has shape {list(stored.shape)} in {reader.folder} but the recipe's experts "
            f"need {list(tensor.global_shape[1:])}."
        )
    value = reader.read(dense, tuple(tensor.global_offset[1:]), tuple(tensor.local_shape))
    assert tensor.data is not None
    with torch.no_grad():
        tensor.data.copy_(value)
