"""A run at wandb."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from unimoe_mcore.config.recipe import Recipe
from unimoe_mcore.evaluation.routing_picture import Picture
from unimoe_mcore.training.mirror_rows import Row

OPENING_SECONDS, FINISHING_SECONDS = 45.0, 45.0
"""How long wandb may take to answer first, and to upload what is left at the end."""


class WandbMirror:
    """wandb takes no step back.

    Online, steps that are done again are not shown again. Offline, every process of a run begins
    another folder, of which ``wandb sync`` lets the last one replace the others: each therefore
    shows the run from its first step, under the same identity.
    """

    name = "wandb"

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        self._recipe, self._folder = recipe, folder
        self._run: Any = None

    def open(self, identity: str, step: int) -> int:
        """Begin the run, or go on with it; wandb itself knows where it stopped."""
        import wandb

        settings = self._recipe.logging.wandb
        self._folder.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            project=settings.project,
            entity=settings.entity or None,
            name=self._recipe.name,
            id=identity,
            resume="allow",
            mode=_mode(settings.mode),
            dir=str(self._folder),
            config=asdict(self._recipe),
            settings=wandb.Settings(
                silent=True,
                console="off",  # the log stays where it is
                init_timeout=OPENING_SECONDS,
                finish_timeout=FINISHING_SECONDS,
            ),
        )
        self._run.define_metric("*", step_metric="step")
        return max(0, int(self._run.step) - 1)  # 0 offline

    def write(self, row: Row) -> None:
        """Show numbers; wandb drops what comes for a step before its own."""
        at = max(row.step, self._run.step)
        self._run.log({**row.values, "step": row.step}, step=at)

    def show(self, step: int, name: str, picture: Picture) -> None:
        """Show a picture beside the step's numbers."""
        import wandb

        image = wandb.Image(picture)
        self._run.log({name: image, "step": step}, step=max(step, self._run.step))

    def flush(self) -> None:
        """Nothing to do: another process writes, and outlives this one."""

    def close(self) -> None:
        """Upload what is left."""
        self._run.finish()


def _mode(asked: str) -> Any:
    """wandb's own word for the mode.

    Raises:
        RuntimeError: if it must be online and there is no key.
    """
    import wandb

    if asked == "offline":
        return asked
    if asked == "auto" and (said := os.environ.get("WANDB_MODE")):
        return said
    if wandb.login(prompt=False):
        return "online"
    if asked == "online":
        raise RuntimeError("no API key: log in with `wandb login`, or set WANDB_API_KEY")
    return "offline"
