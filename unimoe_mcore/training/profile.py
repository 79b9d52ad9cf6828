"""A trace of a few steps and a table of what took the time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
from torch.profiler import profile

from unimoe_mcore.config.trainer import ProfileConfig
from unimoe_mcore.training.callbacks import StepRecord

_ROWS = 40


@dataclass
class Profile:
    """Traces the steps that the recipe names, each rank into its own files.

    ``steps-10-12.rank-00000.json.gz`` opens in ``chrome://tracing`` or Perfetto;
    ``steps-10-12.rank-00000.txt`` lists the operations that took longest.

    Attributes:
        config: which steps, which ranks.
        folder: where the files go.
    """

    config: ProfileConfig
    folder: Path
    _running: profile | None = None

    def start(self, step: int) -> None:
        """Begin if the run goes on within the traced steps."""
        self._begin(step)

    def step(self, record: StepRecord) -> None:
        """Write after the last traced step; begin before the first."""
        if self._running is not None and record.step == self._last:
            self._running.stop()
            self._write(self._running)
            self._running = None
        self._begin(record.step)

    def end(self) -> None:
        """Nothing to do: the steps end within the run."""

    @property
    def _last(self) -> int:
        return self.config.steps[1] if self.config.steps else 0

    def _begin(self, done: int) -> None:
        """Start before the first traced step, or within a stretch that a restart cut into."""
        traces = self.config.ranks == "all" or dist.get_rank() == 0
        if not (traces and self.config.steps and self._running is None):
            return
        if self.config.steps[0] <= done + 1 <= self._last:
            self._running = profile()
            self._running.start()

    def _write(self, trace: profile) -> None:
        first, last = self.config.steps
        self.folder.mkdir(parents=True, exist_ok=True)
        stem = self.folder / f"steps-{first}-{last}.rank-{dist.get_rank():05d}"
        trace.export_chrome_trace(f"{stem}.json.gz")
        rows = trace.key_averages().table(sort_by="self_cpu_time_total", row_limit=_ROWS)
        Path(f"{stem}.txt").write_text(rows, encoding="utf8")
