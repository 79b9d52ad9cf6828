"""Validation: held-out loss while a run trains, and the checkpoint at which it was lowest."""

from __future__ import annotations

import math
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


@dataclass
class Validation:
    """Measures the held-out loss every so many steps and after the last one.

    Writes ``validation.jsonl``: step, split, number of questions, seconds, ``loss`` and
    ``loss/<group>`` per label token as in ``metrics.jsonl``, ``exact/<dataset>``. The best step is
    that of the lowest ``loss``; it is saved, and its checkpoint kept.

    Attributes:
        settings: when.
        steps: number of the run's last step.
        name: of the run, in what is printed.
        run: where lines go; only rank 0 writes.
        checkpoints: where the best one is marked.
        measure: the held-out losses now, the same on every rank; a collective.
        save: saves the checkpoint of a step.
        questions: how many are asked.
        best_step: number of steps after which the loss was lowest; 0 if it was not measured.
        best_loss: that loss.
    """

    settings: ValidationConfig
    steps: int
    name: str
    run: RunDirectory
    checkpoints: CheckpointFolder
    measure: Callable[[], dict[str, float]]
    save: Callable[[int], None]
    questions: int
    best_step: int = field(default=0, init=False)
    best_loss: float = field(default=math.inf, init=False)

    def start(self, step: int) -> None:
        """Take up the best step so far from the lines that a resumed run keeps."""
        for line in self.run.validations():
            asked = (line["split"], line["questions"]) == (self.settings.split, self.questions)
            if asked and line["step"] <= step:
                self._judge(line["step"], line["loss"])
        if self.best_step:
            self.saved(self.best_step)

    def step(self, record: StepRecord) -> None:
        """Validate if it is time; save what is the best so far."""
        if record.step % self.settings.every and record.step != self.steps:
            return
        began = time.perf_counter()
        losses = self.measure()
        self.run.validation(self._line(record.step, losses, time.perf_counter() - began))
        best = self._judge(record.step, losses["loss"])
        if self.run.writes:
            tqdm.write(f"{self.name}  step {record.step:>5}/{self.steps}  {_words(losses, best)}")
        if best:
            self.save(record.step)

    def end(self) -> None:
        """Nothing to do."""

    def saved(self, step: int) -> None:
        """Mark the best step's checkpoint, which is there from now on, as the one to keep.

        Only now: until the new one is there, the old one is the best that there is.
        """
        if step == self.best_step and self.run.writes and self.checkpoints.at(step).is_dir():
            self.checkpoints.mark_best(step)

    def _judge(self, step: int, loss: float) -> bool:
        if not loss < self.best_loss:
            return False
        self.best_step, self.best_loss = step, loss
        return True

    def _line(self, step: int, losses: dict[str, float], seconds: float) -> dict[str, Any]:
        return {
            "step": step,
            "split": self.settings.split,
            "questions": self.questions,
            "seconds": round(seconds, 3),
            **losses,
        }


def _words(losses: dict[str, float], best: bool) -> str:
    each = ", ".join(
        f"{name.removeprefix('loss/')} {value:.3f}"
        for name, value in losses.items()
        if name.startswith("loss/")
    )
    return f"held-out loss {losses['loss']:.3f} ({each}){', the lowest so far' if best else ''}"
