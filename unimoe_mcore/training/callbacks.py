"""What happens besides the step itself: progress, metrics, checkpoints."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from tqdm import tqdm

from unimoe_mcore.runtime.run_directory import RunDirectory
from unimoe_mcore.training.meter import Measured


@dataclass(frozen=True)
class StepRecord:
    """One finished step, as callbacks see it.

    Attributes:
        step: number of steps done, from 1.
        losses: ``loss`` and ``loss/<group>``, per label token.
        grad_norm: before clipping.
        lr: learning rate.
        label_tokens: of the global batch.
        tokens: of the global batch, without padding.
        samples: of the global batch.
        microbatches: on every rank.
        seconds: wall time of the step.
        data_seconds: of these, reading and packing on this rank.
        lrs: learning rates of the parts where it is another one.
        routing: ``router/...`` metrics, in the steps that record them.
        measured: what the step cost.
    """

    step: int
    losses: dict[str, float]
    grad_norm: float
    lr: float
    label_tokens: int
    tokens: int
    samples: int
    microbatches: int
    seconds: float
    data_seconds: float
    measured: Measured
    lrs: dict[str, float] = field(default_factory=dict)
    routing: dict[str, Any] = field(default_factory=dict)

    def flat(self, peak: float) -> dict[str, Any]:
        """As one line of ``metrics.jsonl``.

        Args:
            peak: operations a second that all ranks together could do at most.
        """
        apart = ("losses", "lr", "lrs", "routing", "measured")
        fields = {k: v for k, v in vars(self).items() if k not in apart}
        fields |= vars(self.measured) | {
            "tokens_per_second": self.tokens / self.seconds,
            "samples_per_second": self.samples / self.seconds,
            "operations_per_second": self.measured.operations / self.seconds,
            "mfu": self.measured.operations / self.seconds / peak,
        }
        rounded = {k: round(v, 6) if isinstance(v, float) else v for k, v in fields.items()}
        # Unrounded: rates may be tiny, and losses are what a resumed run is compared by.
        rates = {"lr": self.lr, **{f"lr/{part}": lr for part, lr in self.lrs.items()}}
        return {**rounded, **rates, **self.losses, **self.routing}


class Callback(Protocol):
    """Something periodic. Every method is called on every rank."""

    def start(self, step: int) -> None:
        """Before the first step; ``step`` steps were done by an earlier process."""

    def step(self, record: StepRecord) -> None:
        """After a step."""

    def end(self) -> None:
        """After the last step."""


@dataclass
class Metrics:
    """Writes ``metrics.jsonl``.

    Attributes:
        run: where lines go.
        peak: operations a second that all ranks together could do at most.
    """

    run: RunDirectory
    peak: float

    def start(self, step: int) -> None:
        """Drop lines of steps that are done again."""
        self.run.forget_after(step)

    def step(self, record: StepRecord) -> None:
        """Write one line."""
        self.run.metrics(record.flat(self.peak))

    def end(self) -> None:
        """Nothing to do."""


@dataclass
class Progress:
    """A bar with rate and time left on a terminal, a plain line now and then elsewhere."""

    name: str
    steps: int
    every: int
    shown: bool
    _bar: Any = None
    _began: float = field(default=0.0)
    _from: int = 0

    def start(self, step: int) -> None:
        """Show that training begins, and where."""
        self._began, self._from = time.perf_counter(), step
        if self.shown and sys.stderr.isatty():
            self._bar = tqdm(total=self.steps, initial=step, desc=self.name, unit="step")

    def step(self, record: StepRecord) -> None:
        """Show the step's loss and speed."""
        if not self.shown:
            return
        loss = f"{record.losses['loss']:.3f}"
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {loss}", refresh=False)
            self._bar.update(1)
        elif record.step in (self._from + 1, self.steps) or record.step % self.every == 0:
            done = record.step - self._from
            each = (time.perf_counter() - self._began) / done
            left = each * (self.steps - record.step)
            print(
                f"{self.name}  step {record.step:>5}/{self.steps}  loss {loss}  "
                f"{record.tokens / record.seconds:>6.0f} tokens/s  {left:>4.0f} s left",
                flush=True,
            )

    def end(self) -> None:
        """Leave the finished bar on the terminal."""
        if self._bar is not None:
            self._bar.close()


@dataclass
class Checkpoints:
    """Begins to save every ``every`` steps and after the last one.

    Attributes:
        every: steps.
        steps: number of the last one.
        save: copies what is trained, and returns while it is being written.
        look: looks whether it is written; raises if it cannot be.
        finish: waits until it is.
    """

    every: int
    steps: int
    save: Callable[[int], None]
    look: Callable[[], None]
    finish: Callable[[], None]

    def start(self, step: int) -> None:
        """Nothing to do."""

    def step(self, record: StepRecord) -> None:
        """Look after the checkpoint that is being written; save if it is time."""
        self.look()
        if record.step % self.every == 0 or record.step == self.steps:
            self.save(record.step)

    def end(self) -> None:
        """Wait for the last checkpoint."""
        self.finish()
