"""Checkpoints of a run: what trains, its optimizer state, and the plan's position.

Imports Megatron only where tensors are read, so that a launcher can look at checkpoints.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unimoe_mcore.checkpoints.files import write_text
from unimoe_mcore.config.errors import UserError

if TYPE_CHECKING:
    from unimoe_mcore.model.unimoe import UniMoEModel

STATE = "state.json"
_BEST = "best.json"


@dataclass(frozen=True)
class RunState:
    """What a run needs, besides tensors, to go on where it stopped.

    Attributes:
        step: optimizer steps done.
        sources: what the run stands on (base, experts, connectors) -> hash.
        plan: position in the data plan (``PlanState.to_json``).
        precision: number format of the run.
    """

    step: int
    sources: dict[str, str]
    plan: dict[str, Any]
    precision: str


class CheckpointFolder:
    """The checkpoints of one run: ``step-00000100`` and so on, each whole or not there.

    Attributes:
        folder: where they are.
        keep: how many of the newest are kept.
        keep_every: those of every so many steps are kept as well; 0 keeps no more.
    """

    def __init__(self, folder: Path, keep: int, keep_every: int = 0) -> None:
        self.folder = folder
        self.keep = keep
        self.keep_every = keep_every

    def at(self, step: int) -> Path:
        """Where the checkpoint of a step is, or will be."""
        return self.folder / f"step-{step:08d}"

    def finished(self) -> list[Path]:
        """The finished checkpoints, newest first."""
        found = [p for p in self.folder.glob("step-*") if re.fullmatch(r"step-\d{8}", p.name)]
        return sorted(found, key=lambda p: p.name, reverse=True)

    def clear(self) -> None:
        """Remove what a killed process left half written; before anything is saved."""
        for left in self.folder.glob(".partial-*"):
            shutil.rmtree(left)
        for old in self.folder.glob(".old-*"):
            shutil.rmtree(old)

    def newest_whole(self, tell: Callable[[Path, str], None]) -> Path | None:
        """The newest checkpoint whose files have their checksums; None if there is none at all.

        Args:
            tell: called with every damaged one and what is wrong with it.

        Raises:
            UserError: if there are checkpoints, but all are damaged.
        """
        from unimoe_mcore.checkpoints.store import ShardReader

        found = self.finished()
        for folder in found:
            try:
                read_state(folder)
                ShardReader(folder, verify=True)
            except UserError as error:
                tell(folder, str(error))
            else:
                return folder
        if found:
            raise UserError(f"All checkpoints in {self.folder} are damaged: delete it to restart.")
        return None

    def mark_best(self, step: int) -> None:
        """Keep the checkpoint of a step, whatever its age, until another one is the best.

        Args:
            step: one that is saved, or being saved.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(self.folder / _BEST, json.dumps({"step": step}))

    def best(self) -> Path | None:
        """The checkpoint that was marked as the best, if it is there.

        Raises:
            UserError: if the mark cannot be read.
        """
        mark = self.folder / _BEST
        if not mark.is_file():
            return None
        try:
            folder = self.at(int(json.loads(mark.read_text(encoding="utf8"))["step"]))
        except (OSError, TypeError, ValueError, KeyError) as error:
            raise UserError(f"{mark} cannot be read: {error}; delete it.") from error
        return folder if folder.is_dir() else None

    def forget_old(self) -> None:
        """Remove the checkpoints that no rule keeps."""
        best = self.best()
        for old in self.finished()[self.keep :]:
            step = int(old.name.removeprefix("step-"))
            if old == best or (self.keep_every and step % self.keep_every == 0):
                continue
            # First out of sight: half of a checkpoint must not look like one that is damaged.
            hidden = old.with_name(f".old-{old.name}")
            old.rename(hidden)
            shutil.rmtree(hidden)


def read_state(folder: Path) -> RunState:
    """The state file of a checkpoint.

    Raises:
        UserError: if it cannot be read.
    """
    try:
        return RunState(**json.loads((folder / STATE).read_text(encoding="utf8")))
    except (OSError, TypeError, ValueError) as error:
        raise UserError(f"The checkpoint {folder} cannot be read: {error}.") from error


def load_checkpoint(folder: Path, chunks: Sequence[UniMoEModel], optimizer: Any) -> None:
    """Fill trained parameters, their fp32 copies and the optimizer's state.

    Any layout can read what any other wrote. The files have been verified (``newest_whole``).

    Raises:
        UserError: if the checkpoint lacks a tensor.
    """
    from unimoe_mcore.checkpoints.store import ShardReader
    from unimoe_mcore.checkpoints.trained import load_pieces

    load_pieces(ShardReader(folder, verify=False), chunks, optimizer)
