"""How long a training loop stands still for a checkpoint that is written behind its back.

For two models the loop trains, saves every ``INTERVAL`` seconds and goes on. The share is that of
the loop's time; the first save, which also makes the memory that it copies into, is not counted.
Steps are timed while a checkpoint is being written and while none is, so that what the writer takes
from the loop on the side is seen as well.
"""

from __future__ import annotations

from unimoe_mcore.runtime.devices import prepare_device

prepare_device()

import shutil  # noqa: E402
import statistics  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402
from collections.abc import Callable, Sequence  # noqa: E402
from dataclasses import dataclass  # noqa: E402
from pathlib import Path  # noqa: E402

import torch  # noqa: E402
from megatron.core import dist_checkpointing  # noqa: E402

from benchmarks.side_by_side import seconds, write  # noqa: E402
from data_pipeline.conversation.template import Rendered  # noqa: E402
from data_pipeline.reading.collate import MicroBatch, collate  # noqa: E402
from data_pipeline.reading.sample import Sample  # noqa: E402
from unimoe_mcore.checkpoints.saving import Saved, Saver  # noqa: E402
from unimoe_mcore.checkpoints.sources import Sources  # noqa: E402
from unimoe_mcore.checkpoints.trained import checkpoint_pieces  # noqa: E402
from unimoe_mcore.checkpoints.training import CheckpointFolder, RunState  # noqa: E402
from unimoe_mcore.config.composition import compose_recipe  # noqa: E402
from unimoe_mcore.runtime import groups  # noqa: E402
from unimoe_mcore.runtime.capabilities import detect, transformer_flags  # noqa: E402
from unimoe_mcore.training.module import TrainModule  # noqa: E402
from unimoe_mcore.training.step import train_step  # noqa: E402

INTERVAL = 20.0
SAVES = 4
TOKENS = 256
STATE = {"sources": {}, "plan": {}, "precision": "fp32"}


@dataclass
class Loop:
    """A training loop that saves now and then."""

    module: TrainModule
    folder: Path
    batch: MicroBatch

    def __post_init__(self) -> None:
        self.saver = Saver(CheckpointFolder(self.folder, keep=1), 0, 1, "benchmark")
        self.steps = {True: [], False: []}  # type: dict[bool, list[float]]
        self.saved: list[Saved] = []

    def step(self) -> float:
        """Seconds of one step."""
        return seconds(lambda: train_step(self.module, [self.batch], 0))

    def save(self, step: int) -> None:
        """Stop for a copy."""
        pieces = checkpoint_pieces(self.module.chunks, self.module.optimizer)
        self.saver.save(pieces, RunState(step=step, **STATE))  # type: ignore[arg-type]

    def run(self) -> None:
        """Train and save every ``INTERVAL`` seconds, ``SAVES`` times."""
        self.step()
        for number in range(SAVES):
            self.save(number)
            writing, until = True, time.perf_counter() + INTERVAL
            while time.perf_counter() < until:
                self.steps[writing].append(self.step())
                found = self.saver.poll()
                self.saved += found
                writing = writing and not found
        self.saved += self.saver.wait()

    def save_and_wait(self) -> None:
        """The same without a background."""
        self.save(1)
        self.saver.wait()

    def megatrons(self) -> None:
        """Megatron's own format, written while the loop waits."""
        place = self.folder / "torch_dist"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        state = {"model": self.module.chunks[0].sharded_state_dict()}
        state["optimizer"] = self.module.optimizer.sharded_state_dict(state)
        dist_checkpointing.save(state, str(place))


def row(what: str, overrides: Sequence[str], folder: Path) -> str:
    """One model."""
    recipe = compose_recipe("base", ["parallel.processes=1", *overrides])
    collection = groups.initialise(recipe.parallel)
    markers = {"image": 4, "video": 5, "speech": 6, "audio": 7}
    module = TrainModule(
        recipe, collection, markers, transformer_flags(detect()), Sources(), "fp32"
    )
    ids = torch.randint(8, 250, (TOKENS,)).tolist()
    sample = Sample("one", "none", "text", Rendered(ids, [True] * TOKENS))
    loop = Loop(module, folder / what, collate([sample], 0, TOKENS))
    loop.run()
    later = loop.saved[1:]  # the first one makes the memory
    stopped = [each.stopped for each in later]
    waited, theirs = (median(work) for work in (loop.save_and_wait, loop.megatrons))
    quiet, busy = (statistics.median(loop.steps[writing]) for writing in (False, True))
    groups.destroy(keep_world=True)
    return (
        f"| {what} | {loop.saved[0].bytes / 1e6:.0f} | {loop.saved[0].stopped * 1e3:.0f} "
        f"| {statistics.median(stopped) * 1e3:.1f} | {max(stopped) / INTERVAL:.2%} "
        f"| {statistics.median(each.writing for each in later):.2f} "
        f"| {quiet * 1e3:.0f} | {busy * 1e3:.0f} | {waited:.2f} | {theirs:.2f} |"
    )


def median(work: Callable[[], object]) -> float:
    """Median of three."""
    return statistics.median(seconds(work) for _ in range(3))


COLUMNS = (
    "trained parameters, fp32, one process",
    "MB",
    "first stop, ms",
    "later stops, ms",
    f"longest, share of {INTERVAL:.0f} s",
    "written after, s",
    "step, ms",
    "step while writing, ms",
    "waiting instead, s",
    "torch_dist, s",
)


def main() -> None:
    folder = Path(tempfile.mkdtemp(dir=sys.argv[1] if sys.argv[1:] else None))
    wide = ["model.language.hidden=576", "model.language.ffn=1536", "model.language.blocks=8"]
    wide += ["model.language.heads=9", "model.language.kv_heads=3"]
    rows = [
        row("3.64 M (the quickstart's base)", [], folder),
        row("29 M (8 blocks of SmolLM2-135M's width)", wide, folder),
    ]
    write(
        "checkpoint_save",
        f"What a checkpoint every {INTERVAL:.0f} s costs the training loop",
        rows,
        COLUMNS,
        (
            "Stops: from the call to the end of the copy. A step is one sequence of "
            f"{TOKENS} tokens. *Waiting instead*: the same save when the loop waits for the file. "
            "*torch_dist*: Megatron's format, waited for, with all parameters.",
        ),
    )
    groups.destroy()
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
