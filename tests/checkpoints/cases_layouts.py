"""Runs inside the processes of ``run_distributed``: saved in one layout, continued in another."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.training.cases_stages import composed, opened
from unimoe_mcore.checkpoints.store import ShardReader
from unimoe_mcore.checkpoints.training import load_checkpoint
from unimoe_mcore.runtime import groups
from unimoe_mcore.training.schedule import learning_rate
from unimoe_mcore.training.stage import StageRun
from unimoe_mcore.training.step import train_step


def run(
    folder: str,
    recipe: str,
    extra: list[str],
    steps: tuple[int, int],
    load: str = "",
    save: str = "",
) -> dict[str, Any]:
    """A few steps of a stage.

    Args:
        steps: first and last, the latter excluded.
        load: checkpoint to begin with.
        save: where a checkpoint is written, before the first step if there is one to begin with,
            else after the last.

    Returns:
        Loss and gradient norm of every step, and whether the optimizers are distributed.
    """
    stage = opened(composed(folder, recipe, "name=scratch", *extra))
    module = stage.module
    log = []
    if load:
        load_checkpoint(Path(load), module.chunks, module.optimizer)
        if save:
            write(stage, steps[0], Path(save))
    with stage.pool(stage.samples) as pool:
        feed = stage.feed(pool)
        for step in range(*steps):
            result = train_step(module, feed.read(step), learning_rate(step, stage.recipe.trainer))
            total = result.sums.sum(0)
            log.append([(total[0] / total[1]).item(), result.grad_norm])
    if save and not load:
        write(stage, steps[1], Path(save))
    kinds = {type(link).__name__ for link in module.optimizer.chained_optimizers}
    dist.barrier()
    groups.destroy(keep_world=True)
    if dist.get_rank() == 0:
        shutil.rmtree(stage.directory.path, ignore_errors=True)
    dist.barrier()
    return {"log": log, "optimizers": sorted(kinds)}


def write(stage: StageRun, step: int, target: Path) -> None:
    """Save a checkpoint and move it to where the test looks."""
    stage._save(step)
    stage.saver.wait()
    dist.barrier()
    if dist.get_rank() == 0:
        stage.checkpoints.at(step).rename(target)
    dist.barrier()


def runs(folder: str, cases: dict[str, Any]) -> dict[str, Any]:
    """``run`` for every case: name -> its arguments."""
    return {name: run(folder, **case) for name, case in cases.items()}


def contents(folder: Path) -> dict[str, tuple[int | None, torch.Tensor]]:
    """Steps and whole value of every tensor of a checkpoint."""
    reader = ShardReader(folder)
    return {name: (stored.step, reader.read(name)) for name, stored in reader.tensors.items()}
