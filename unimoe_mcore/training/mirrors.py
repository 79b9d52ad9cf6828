"""Mirrors of the run directory, which is the truth: they may fail without harm.

A mirror is fed by a thread of its own, so that the loop never waits for it, from the lines that
the run directory holds and nothing else. ``mirrors/`` notes how far each one is: a run that is
continued continues its mirrors, and what a mirror missed is made up for.
"""

from __future__ import annotations

import json
import queue
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Protocol

from unimoe_mcore.checkpoints.files import write_text
from unimoe_mcore.config.recipe import Recipe
from unimoe_mcore.evaluation.routing_picture import Picture, draw_routing
from unimoe_mcore.runtime.run_directory import RunDirectory
from unimoe_mcore.training.callbacks import StepRecord
from unimoe_mcore.training.mirror_rows import VALIDATION, Records, Row, expert_names
from unimoe_mcore.training.mirror_tensorboard import TensorBoardMirror
from unimoe_mcore.training.mirror_wandb import WandbMirror

CLOSING_SECONDS = 60.0
"""How long the end of a run waits for its mirrors, all of them together."""
MARK_SECONDS = 5.0
"""How long a mirror may be further than its mark: a kill has these steps shown again."""


class Mirror(Protocol):
    """Somewhere else to look at a run. Methods may raise anything; the first time is the last.

    Attributes:
        name: what it is called.
    """

    name: str

    def open(self, identity: str, step: int) -> int:
        """Open it.

        Args:
            identity: of the run, the same whenever it is continued.
            step: up to which earlier processes have shown everything, and the run goes on.

        Returns:
            The last step that need not be shown.
        """

    def write(self, row: Row) -> None:
        """Show a step's numbers."""

    def show(self, step: int, name: str, picture: Picture) -> None:
        """Show a picture of a step."""

    def flush(self) -> None:
        """Have what was shown survive this process."""

    def close(self) -> None:
        """Finish."""


@dataclass
class Mark:
    """What a mirror holds; kept in the run directory.

    Attributes:
        identity: of the run at the mirror.
        step: the last step.
        answers: evaluation -> number of steps that were done before it.
    """

    identity: str = field(default_factory=lambda: secrets.token_hex(4))
    step: int = 0
    answers: dict[str, int] = field(default_factory=dict)


class Follower:
    """Feeds one mirror, in a thread. Opens it when there is something that it does not hold.

    Args:
        split: whose questions the evaluations ask.
        experts: names of the experts.
    """

    def __init__(self, run: RunDirectory, mirror: Mirror, split: str, experts: list[str]) -> None:
        self._run, self._mirror, self._split, self._experts = run, mirror, split, experts
        self._records = Records(run, experts)
        self._file = run.mirrors / f"{mirror.name}.json"
        self._mark = Mark()
        self._is_open, self._held = False, 0
        self._told = threading.Lock()
        self._marked_at, self._is_ahead = -MARK_SECONDS, False
        self._work: queue.SimpleQueue[int | Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._follow, name=mirror.name, daemon=True)

    def start(self, step: int) -> None:
        """Begin; ``step`` steps were done by an earlier process."""
        self._work.put(lambda: self._begin(step))
        self._thread.start()
        self.step(step)

    def step(self, step: int) -> None:
        """Mirror all steps up to this one."""
        self._work.put(step)

    def answered(self, step: int) -> None:
        """Mirror the evaluation after the last step, if there is one."""
        self._work.put(lambda: self._answers("after", step))

    def finish(self) -> None:
        """Nothing more will come."""
        self._work.put(None)

    def join(self, deadline: float) -> None:
        """Wait until it has finished, but no longer than to a time of ``time.monotonic``."""
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self._switched_off(f"it did not finish within {CLOSING_SECONDS:.0f} s")

    def _follow(self) -> None:
        try:
            for work in self._works():
                if callable(work):
                    work()
                else:
                    self._rows(work)
            if self._is_open:
                self._keep_mark()
                self._mirror.close()
        except Exception as error:  # a mirror's own code: anything may come of it
            lines = str(error).strip().splitlines()
            self._switched_off(
                f"{type(error).__name__}: {lines[0] if lines else 'no reason given'}"
            )
            with suppress(Exception):  # what it did show need not be shown again
                self._keep_mark()

    def _works(self) -> Iterator[int | Callable[[], None]]:
        """What is to be done, until it is finished; of steps on end the newest alone."""
        while True:
            try:
                works = [self._work.get(timeout=MARK_SECONDS if self._is_ahead else None)]
            except queue.Empty:
                self._keep_mark()
                continue
            while not self._work.empty():
                works.append(self._work.get())
            for work, after in zip_longest(works, works[1:]):
                if work is None:
                    return
                if not (isinstance(work, int) and isinstance(after, int)):
                    yield work

    def _begin(self, step: int) -> None:
        if self._file.is_file():
            self._mark = Mark(**json.loads(self._file.read_text(encoding="utf8")))
        self._mark.step = min(self._mark.step, step)

    def _rows(self, step: int) -> None:
        if step <= self._mark.step and not self._is_open:
            return
        self._open()
        for row in self._records.until(step):
            if row.step > self._held:
                self._mirror.write(row)
                self._show(row, VALIDATION)
            self._mark.step, self._is_ahead = row.step, True
        self._mark.step = step
        if time.monotonic() > self._marked_at + MARK_SECONDS:
            self._keep_mark()

    def _open(self) -> None:
        if self._is_open:
            return
        self._write_mark()  # the identity is known before anything is shown under it
        self._is_open = True
        self._held = self._mirror.open(self._mark.identity, self._mark.step)
        if not self._held:
            self._mark.answers.clear()
        self._answers("before", 0)

    def _answers(self, name: str, step: int) -> None:
        path = self._run.evaluation(name, self._split)
        if self._mark.answers.get(name) == step or not path.is_file():
            return
        self._open()
        self._rows(step)
        row = self._records.answers(name, self._split, step)
        self._mirror.write(row)
        self._show(row, name)
        self._mark.answers[name] = step
        self._keep_mark()

    def _show(self, row: Row, name: str) -> None:
        if row.routing:
            picture = draw_routing(row.routing, self._experts, f"{name}, step {row.step}")
            self._mirror.show(row.step, f"routing/{name}", picture)

    def _keep_mark(self) -> None:
        """Have what was shown, and how far that is, survive this process."""
        self._mirror.flush()
        self._write_mark()
        self._marked_at, self._is_ahead = time.monotonic(), False

    def _write_mark(self) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        write_text(self._file, json.dumps(asdict(self._mark)))

    def _switched_off(self, reason: str) -> None:
        """Say so, once."""
        if self._told.acquire(blocking=False):
            self._run.event("mirror failed", mirror=self._mirror.name, reason=reason)
            print(
                f"{self._run.path.name}: the {self._mirror.name} mirror is off, the run goes on: "
                f"{reason}",
                file=sys.stderr,
                flush=True,
            )


class Mirrors:
    """All mirrors of a run, told by its first rank: a callback, after those that write lines.

    It stays open after the last step for the evaluation that is still to come.
    """

    def __init__(self, run: RunDirectory, recipe: Recipe) -> None:
        self._run, self._steps = run, recipe.trainer.steps
        split, experts = recipe.trainer.evaluation.split, expert_names(recipe.stage.experts)
        mirrors = mirrors_of(recipe, run.mirrors) if run.writes else []
        self._followers = [Follower(run, mirror, split, experts) for mirror in mirrors]

    def start(self, step: int) -> None:
        """Open what is asked for, and take up what earlier processes left."""
        for follower in self._followers:
            follower.start(step)

    def step(self, record: StepRecord) -> None:
        """Mirror a step."""
        for follower in self._followers:
            follower.step(record.step)

    def end(self) -> None:
        """Nothing to do: the evaluation is still to come."""

    def close(self) -> None:
        """Mirror the evaluation after training, and finish."""
        for follower in self._followers:
            follower.answered(self._steps)
            follower.finish()
        deadline = time.monotonic() + CLOSING_SECONDS
        for follower in self._followers:
            follower.join(deadline)


def mirrors_of(recipe: Recipe, folder: Path) -> list[Mirror]:
    """The mirrors that a recipe asks for.

    Args:
        folder: where they keep their files.
    """
    mirrors: list[Mirror] = []
    if recipe.logging.wandb.enabled:
        mirrors.append(WandbMirror(recipe, folder))
    if recipe.logging.tensorboard.enabled:
        mirrors.append(TensorBoardMirror(folder))
    return mirrors
