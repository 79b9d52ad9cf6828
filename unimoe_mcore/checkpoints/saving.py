"""Saving while training goes on: the loop stops for a copy, a thread of every rank writes it.

Every rank's thread writes its own file and then its index. The first rank's thread waits for the
indexes of all ranks, looks whether together they are a checkpoint, and makes it visible by one
rename. Nothing of this needs the ranks to talk: the indexes are the marks. Until the rename there
is a folder that no reader looks at, and that the next start removes.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from unimoe_mcore.checkpoints.files import flush, write_text
from unimoe_mcore.checkpoints.pieces import Piece
from unimoe_mcore.checkpoints.shard_file import HostCopy, Snapshot
from unimoe_mcore.checkpoints.store import ShardReader
from unimoe_mcore.checkpoints.training import STATE, CheckpointFolder, RunState
from unimoe_mcore.config.errors import UserError

_LOOK_EVERY = 0.02
"""Seconds between two looks for the other ranks' indexes."""


@dataclass(frozen=True)
class Saved:
    """A checkpoint that is there.

    Attributes:
        step: optimizer steps done.
        stopped: seconds that the loop stood still for it on this rank.
        writing: seconds from the copy until it was visible (first rank) or this rank's file was
            written (others).
        bytes: of this rank's file.
    """

    step: int
    stopped: float
    writing: float
    bytes: int


class Saver:
    """Saves the checkpoints of a run on this rank, one at a time, behind the loop's back."""

    def __init__(self, folder: CheckpointFolder, rank: int, ranks: int, start: str) -> None:
        """Args:
        folder: where to.
        rank: of this process.
        ranks: number of processes that save.
        start: names this start of the run, the same on every rank: what a process of an earlier
            start may still write does not mix with it.
        """
        self.folder = folder
        self.rank = rank
        self.ranks = ranks
        self.start = start
        self._copy = HostCopy()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._busy: Future[Saved] | None = None
        self._done: list[Saved] = []

    def save(self, pieces: Iterable[Piece], state: RunState, best: bool = False) -> None:
        """Copy the pieces and have them written; waits for the checkpoint before this one.

        Args:
            best: mark it as the best as soon as it is there; until then the old one is.

        Raises:
            UserError: if that one could not be written.
        """
        began = time.perf_counter()
        self._collect()
        snapshot = self._copy.take(pieces)
        stopped = time.perf_counter() - began
        self._busy = self._thread.submit(self._write, snapshot, state, stopped, best)

    def poll(self) -> list[Saved]:
        """Checkpoints that have become visible since the last call; does not wait.

        Raises:
            UserError: if one could not be written.
        """
        if self._busy is not None and self._busy.done():
            self._collect()
        done, self._done = self._done, []
        return done

    def wait(self) -> list[Saved]:
        """Wait until nothing is being written; else as ``poll``."""
        self._collect()
        return self.poll()

    def _collect(self) -> None:
        busy, self._busy = self._busy, None
        if busy is not None:
            self._done.append(busy.result())

    def _write(self, snapshot: Snapshot, state: RunState, stopped: float, best: bool) -> Saved:
        began = time.perf_counter()
        target = self.folder.at(state.step)
        partial = target.with_name(f".partial-{target.name}-{self.start}")
        try:
            partial.mkdir(parents=True, exist_ok=True)
            snapshot.write(partial, self.rank)
            if self.rank == 0:
                self._await_others(partial)
                self._publish(partial, target, state, best)
        except OSError as error:
            place = error.filename or partial
            raise UserError(
                f"The checkpoint of step {state.step} could not be written: {place}: "
                f"{error.strerror or error}; when that is mended, the same command continues from "
                f"the checkpoint before."
            ) from error
        return Saved(state.step, stopped, time.perf_counter() - began, len(snapshot.memory))

    def _await_others(self, partial: Path) -> None:
        """Wait for all indexes. A rank that cannot write its own ends the run, and this wait."""
        missing = [partial / f"rank-{rank:05d}.json" for rank in range(self.ranks)]
        while missing := [path for path in missing if not path.is_file()]:
            time.sleep(_LOOK_EVERY)

    def _publish(self, partial: Path, target: Path, state: RunState, best: bool) -> None:
        ShardReader(partial, verify=False).check_complete()
        write_text(partial / STATE, json.dumps(asdict(state)))
        if target.exists():  # damaged, and gone back from
            shutil.rmtree(target)
        partial.rename(target)
        flush(self.folder.folder)
        if best:  # before old ones go: it may be the oldest already
            self.folder.mark_best(state.step)
        self.folder.forget_old()
