"""The runs that a stage takes its weights from: found, and checked against each other.

Reads manifests only, so that a launcher can refuse a stage before any process starts.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from unimoe_mcore.checkpoints.artefact import MANIFEST, Manifest, check_stands_on, read_manifest
from unimoe_mcore.config.errors import UserError
from unimoe_mcore.config.model import LanguageConfig
from unimoe_mcore.config.recipe import Recipe
from unimoe_mcore.config.stage import OWN_MLP


@dataclass
class Sources:
    """The artefacts a stage takes its weights from, checked against each other.

    Attributes:
        base: facts of the base; None for the base stage itself.
        base_folder: where it is.
        experts: folder per expert, None for the base's own MLP.
        shared: folder of the shared expert, None for the base's own MLP or if there is none.
        connectors: tower -> folder; in stage 1 none, the connectors start fresh.
        hashes: what each part is (``base``, ``expert 1``, ``connector speech``) -> its hash.
    """

    base: Manifest | None = None
    base_folder: Path = Path()
    experts: list[Path | None] = field(default_factory=list)
    shared: Path | None = None
    connectors: dict[str, Path] = field(default_factory=dict)
    hashes: dict[str, str] = field(default_factory=dict)


def find_sources(recipe: Recipe) -> Sources:
    """Read the manifests of all that the recipe names and check that they fit together.

    Raises:
        UserError: a part is missing, stands on another base, has another shape or tower, or two
            runs could give a connector and the recipe does not choose.
    """
    stage = recipe.stage
    if stage.kind == "base":
        return Sources()
    _refuse_missing(recipe)
    base_folder = Path(stage.base)
    base = read_manifest(base_folder, "The base (stage.base)")
    if base.kind != "base":
        raise UserError(
            f"stage.base={base_folder} was given by a stage of kind {base.kind}, it is no base."
        )
    _same_shape(recipe, base, base_folder)
    sources = Sources(base, base_folder, hashes={"base": base.hash})
    for number, entry in enumerate(stage.experts):
        sources.experts.append(None if entry == OWN_MLP else Path(entry))
        if entry != OWN_MLP:
            manifest = _expert(recipe, entry, f"stage.experts[{number}]", base)
            sources.hashes[f"expert {number}"] = manifest.hash
    if stage.shared_expert not in ("", OWN_MLP):
        sources.shared = Path(stage.shared_expert)
        manifest = _expert(recipe, stage.shared_expert, "stage.shared_expert", base)
        sources.hashes["shared expert"] = manifest.hash
    sources.connectors = _connector_sources(recipe, base)
    for tower, folder in sources.connectors.items():
        sources.hashes[f"connector {tower}"] = read_manifest(folder, str(folder)).hash
    return sources


def _expert(recipe: Recipe, entry: str, key: str, base: Manifest) -> Manifest:
    """Facts of an expert that the recipe names under a key.

    Raises:
        UserError: if it is missing, stands on another base, or is no expert.
    """
    manifest = _part(recipe, Path(entry), f"The expert {key}", base)
    if manifest.kind != "expert":
        raise UserError(
            f"{key}={entry} was given by a stage of kind {manifest.kind}, it is no expert."
        )
    return manifest


def _refuse_missing(recipe: Recipe) -> None:
    """Name all runs that are missing at once, if it is more than one.

    Raises:
        UserError: with their folders and how to run them.
    """
    stage = recipe.stage
    named = [stage.base, stage.start, *stage.experts, *stage.connectors.values()]
    named.append(stage.shared_expert)
    folders = dict.fromkeys(Path(name) for name in named if name and name != OWN_MLP)
    absent = [str(folder) for folder in folders if not (folder / MANIFEST).is_file()]
    if len(absent) > 1:
        raise UserError(
            f"This stage stands on runs that are not finished: {', '.join(absent)} are missing; "
            f"run those stages first (python -m unimoe_mcore.launch base, stage1, ...)."
        )


def _part(recipe: Recipe, folder: Path, what: str, base: Manifest) -> Manifest:
    manifest = read_manifest(folder, what)
    check_stands_on(manifest, folder, base, Path(recipe.stage.base))
    return manifest


def _same_shape(recipe: Recipe, base: Manifest, folder: Path) -> None:
    wanted = asdict(recipe.model.language)
    found = {**asdict(LanguageConfig()), **base.language}  # an older base lacks newer keys
    differing = [k for k, v in wanted.items() if found[k] != v]
    if differing:
        words = ", ".join(f"{k}={found[k]} (recipe: {wanted[k]})" for k in differing)
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
        if not folder and stage.kind == "align":
            continue  # stage 1 makes it
        if not folder:
            raise UserError(
                f"The {tower} connector comes from nowhere: name the run that trained it with "
                f"stage.start=FOLDER or stage.connectors.{tower}=FOLDER."
            )
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
        there, here = given.towers[tower], asdict(config)
        if not there["encoder"]:  # a published connector: whatever has features of its width
            there = {**there, "encoder": here["encoder"]}
        if there != here:
            differing = _differing(there, here)
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
