"""The run that is asked: its recipe, one of its checkpoints, its tokenizer.

Imports neither torch nor Megatron, so that a wrong name is refused at once.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.conversation.tokenizer import TextTokenizer
from unimoe_mcore.checkpoints.artefact import TOKENIZER
from unimoe_mcore.checkpoints.sources import Sources, find_sources
from unimoe_mcore.checkpoints.training import CheckpointFolder, RunState, read_state
from unimoe_mcore.config.composition import load_past
from unimoe_mcore.config.errors import UserError
from unimoe_mcore.config.parallel import ParallelConfig
from unimoe_mcore.config.recipe import Recipe
from unimoe_mcore.runtime.run_directory import RunDirectory


@dataclass(frozen=True)
class AskedRun:
    """A run with a checkpoint that fits what it stands on.

    Attributes:
        recipe: of the run, but for the layout, which is that of the processes that answer.
        sources: what it stands on.
        checkpoint: folder of its trained weights.
        state: of the checkpoint.
        tokenizer: of its base.
    """

    recipe: Recipe
    sources: Sources
    checkpoint: Path
    state: RunState
    tokenizer: TextTokenizer


def open_run(folder: Path, wanted: str = "newest", processes: int = 1) -> AskedRun:
    """Find a run and one of its checkpoints.

    Args:
        folder: ``runs/<name>``.
        wanted: ``newest``, ``best``, or ``step-N``.
        processes: that answer together, with the experts divided among them.

    Raises:
        UserError, DataError: there is no such run or checkpoint, what it stands on is missing or
            has changed, or its experts cannot be divided so.
    """
    run = RunDirectory(folder)
    if not folder.is_dir():
        raise UserError(f"There is no run at {folder}: name the folder of one, runs/<name>.")
    if not run.config.is_file():
        raise UserError(f"{folder} is no run: it has no config.yaml.")
    recipe = load_past(run.config)
    recipe.parallel = _layout(recipe, processes)
    checkpoint = _checkpoint(run, wanted)
    sources, state = find_sources(recipe), read_state(checkpoint)
    for part in sorted({*state.sources, *sources.hashes}):
        if state.sources.get(part) != sources.hashes.get(part):
            raise UserError(
                f"{checkpoint} was trained with another {part} than there is now: train the run "
                f"again, or bring the one back that it stands on."
            )
    of_base = run.tokenizer if sources.base is None else sources.base_folder / TOKENIZER
    return AskedRun(recipe, sources, checkpoint, state, TextTokenizer.load(of_base))


def _layout(recipe: Recipe, processes: int) -> ParallelConfig:
    """Every process with the whole model but for the experts, which are divided."""
    if processes == 1:
        return ParallelConfig(processes=1)
    experts = len(recipe.stage.experts) if recipe.stage.kind == "moe" else 0
    if not experts:
        raise UserError(f"{recipe.name} has no experts to divide: ask it with one process.")
    if experts % processes:
        raise UserError(
            f"{experts} experts cannot be divided evenly among {processes} processes: choose "
            f"another number of processes."
        )
    return ParallelConfig(expert=processes, processes=processes)


def _checkpoint(run: RunDirectory, wanted: str) -> Path:
    folder = CheckpointFolder(run.checkpoints, keep=1)
    finished = folder.finished()
    if not finished:
        raise UserError(f"{run.path} has no checkpoint: train it, or wait for its first one.")
    if wanted == "newest":
        return finished[0]
    if wanted == "best":
        best = folder.best()
        if best is None:
            raise UserError(
                f"{run.path} has no best checkpoint: it marks one if trainer.validation.every is "
                f"set; ask the newest one."
            )
        return best
    step = re.fullmatch(r"step-(\d{1,8})", wanted)
    if step is None:
        raise UserError(f"There is no checkpoint {wanted!r}: name newest, best, or step-N.")
    path = folder.at(int(step[1]))
    if path not in finished:
        have = ", ".join(f"step-{int(each.name[5:])}" for each in finished)
        raise UserError(f"{run.path} has no checkpoint {wanted}, only {have}.")
    return path
