"""Validation: held-out loss while a run trains, and the checkpoint at which it was lowest."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tqdm import tqdm

from data_pipeline.planning.catalogue import Catalogue
from unimoe_mcore.checkpoints.training import CheckpointFolder
from unimoe_mcore.config.trainer import ValidationConfig
from unimoe_mcore.runtime.run_directory import RunDirectory
from unimoe_mcore.training.agreement import decided_by_first_rank
from unimoe_mcore.training.callbacks import StepRecord


def spread_rows(catalogue: Catalogue, most: int) -> list[int]:
    """Rows of a catalogue, at most so many of every dataset, evenly spread over it.

    Args:
        most: questions of every dataset; 0 for all.
    """
    datasets = np.array([source.dataset for source in catalogue.sources])
    owner = datasets[catalogue.source_of(np.arange(len(catalogue)))]
    chosen: list[int] = []
    for name in dict.fromkeys(datasets.tolist()):
        rows = np.flatnonzero(owner == name)
        count = min(most or len(rows), len(rows))
        chosen += rows[np.arange(count) * len(rows) // max(1, count)].tolist()
    return chosen


@dataclass(frozen=True)
class Best:
    """A step and its held-out loss.

    Attributes:
        step: number of steps done.
        loss: per label token.
        answered: number of questions that it is over.
    """

    step: int
    loss: float
    answered: int

    def beats(self, other: Best) -> bool:
        """Whether it is better than one before it; over other questions it starts anew."""
        return self.answered != other.answered or self.loss < other.loss


@dataclass
class Validation:
    """Measures the held-out loss every so many steps and after the last one.

    Writes ``validation.jsonl``: step, split, number of questions asked and answered, seconds,
    ``loss`` and ``loss/<group>`` per label token as in ``metrics.jsonl``, ``exact/<dataset>``, and
    where the tokens went, ``router/groups`` as in ``metrics.jsonl``, if that is recorded. The best
    step is that of the lowest ``loss`` over the same questions; it is saved, and its checkpoint
    kept.

    Attributes:
        settings: when.
        steps: number of the run's last step.
        name: of the run, in what is printed.
        run: where lines go; only rank 0 writes.
        checkpoints: where the best one is marked.
        measure: the held-out losses now, and how many ``answered`` they are of, the same on every
            rank; a collective.
        save: saves the checkpoint of a step as the best one.
        asked: number of questions.
        best: the step after which the loss was lowest, if it was measured.
    """

    settings: ValidationConfig
    steps: int
    name: str
    run: RunDirectory
    checkpoints: CheckpointFolder
    measure: Callable[[], dict[str, Any]]
    save: Callable[[int], None]
    asked: int
    best: Best | None = field(default=None, init=False)

    def start(self, step: int) -> None:
        """Take up the best step so far from the lines that a resumed run keeps."""
        # One rank looks for all: another may see an older file.
        self.best = decided_by_first_rank(lambda: self._find_best(step))

    def step(self, record: StepRecord) -> None:
        """Validate if it is time; save what is the best so far."""
        if record.step % self.settings.every and record.step != self.steps:
            return
        began = time.perf_counter()
        losses = self.measure()
        self.run.validation(self._line(record.step, losses, time.perf_counter() - began))
        now = Best(record.step, losses["loss"], int(losses["answered"]))
        better = self.best is None or now.beats(self.best)
        if self.run.writes:
            tqdm.write(f"{self.name}  step {record.step:>5}/{self.steps}  {_words(losses, better)}")
        if better:
            self.best = now
            self.save(record.step)

    def end(self) -> None:
        """Nothing to do."""

    def _find_best(self, step: int) -> Best | None:
        """The best of the lines up to a step, if its checkpoint is there; it is marked then."""
        best: Best | None = None
        for line in self.run.validations():
            same = (line["split"], line["asked"]) == (self.settings.split, self.asked)
            if same and line["step"] <= step:
                one = Best(line["step"], line["loss"], line["answered"])
                best = one if best is None or one.beats(best) else best
        if best is None or not self.checkpoints.at(best.step).is_dir():
            return None
        self.checkpoints.mark_best(best.step)
        return best

    def _line(self, step: int, losses: dict[str, Any], seconds: float) -> dict[str, Any]:
        return {
            "step": step,
            "split": self.settings.split,
            "asked": self.asked,
            "seconds": round(seconds, 3),
            **losses,
        }


def _words(losses: dict[str, Any], best: bool) -> str:
    each = ", ".join(
        f"{name.removeprefix('loss/')} {value:.3f}"
        for name, value in losses.items()
        if name.startswith("loss/")
    )
    return f"held-out loss {losses['loss']:.3f} ({each}){', the lowest so far' if best else ''}"
