"""Another run's weights to begin with (``stage.init_from``): found, and checked against the base.

Reads manifests and state files only, so that a launcher can refuse before any process starts.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from unimoe_mcore.checkpoints.artefact import MANIFEST, read_manifest
from unimoe_mcore.checkpoints.sources import Sources
from unimoe_mcore.checkpoints.training import STATE, CheckpointFolder, read_state
from unimoe_mcore.config.errors import UserError
from unimoe_mcore.config.recipe import Recipe


@dataclass(frozen=True)
class Start:
    """Weights that trained parameters begin with.

    Attributes:
        folder: holds them.
        prefix: what their names begin with there.
    """

    folder: Path
    prefix: str


def find_start(recipe: Recipe, sources: Sources) -> Start | None:
    """What ``stage.init_from`` names; None if it names nothing.

    A run's directory means its newest checkpoint, or what it gave if it has none;
    ``.../checkpoints/best`` the checkpoint that was marked as the best.

    Raises:
        UserError: if there is nothing, or it was trained on another base.
    """
    if not recipe.stage.init_from:
        return None
    named = Path(recipe.stage.init_from)
    folder = _resolved(named)
    base = sources.base.hash if sources.base is not None else ""
    if (folder / STATE).is_file():
        found, prefix = read_state(folder).sources.get("base", ""), "model."
    elif (folder / MANIFEST).is_file():
        manifest = read_manifest(folder, f"stage.init_from={named}")
        of_base = manifest.kind == "base" and sources.base is None
        found, prefix = "" if of_base else manifest.stands_on, ""
    else:
        raise UserError(
            f"stage.init_from={named} is no run with a checkpoint, no checkpoint, and nothing that "
            f"a run gave: name such a folder."
        )
    if found != base:
        raise UserError(
            f"stage.init_from={named} was trained on base {found[:12] or 'none'}, this run stands "
            f"on {base[:12] or 'none'}: name a run on the same base."
        )
    return Start(folder, prefix)


def _resolved(named: Path) -> Path:
    if named.name == "best":
        return CheckpointFolder(named.parent, keep=1).best() or named
    checkpoints = CheckpointFolder(named / "checkpoints", keep=1).finished()
    if checkpoints:
        return checkpoints[0]
    return named / "gives" if (named / "gives").is_dir() else named
