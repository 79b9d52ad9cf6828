"""Runs inside the processes of ``run_distributed``: whole stages, layouts, resumes."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from data_pipeline.reading.collate import MicroBatch, collate
from data_pipeline.reading.reader import SampleReader
from tests.workspace import build_data, overrides
from unimoe_mcore.compose import prepare_run
from unimoe_mcore.config.composition import compose_recipe
from unimoe_mcore.config.recipe import Recipe
from unimoe_mcore.runtime import groups
from unimoe_mcore.runtime.run_directory import RunDirectory, read_lines
from unimoe_mcore.training.agreement import decided_by_first_rank
from unimoe_mcore.training.data import reading_job
from unimoe_mcore.training.stage import StageRun
from unimoe_mcore.training.step import train_step

SCHEDULE = (
    ("base",),
    ("stage1",),
    ("stage2", "stage.expert=image"),
    ("stage2", "stage.expert=speech"),
    ("stage2", "stage.expert=audio"),
    ("stage3",),
)

LONG_RUN = ("stage2", "stage.expert=speech", "trainer.steps=40", "trainer.checkpoint_every=3")
"""A run that can be killed (``tests/checkpoints/test_resume.py``)."""


def composed(folder: str, recipe: str, *extra: str) -> Recipe:
    """A recipe for the tiny world and this number of processes."""
    return compose_recipe(
        recipe, [*overrides(Path(folder)), *extra], world_size=groups_world_size()
    )


def groups_world_size() -> int:
    """Processes of this launch, known before torch.distributed is set up."""
    import os

    return int(os.environ["WORLD_SIZE"])


def opened(recipe: Recipe) -> StageRun:
    """A stage, built and loaded, on this rank."""
    collection = groups.initialise(recipe.parallel, seed=recipe.trainer.seed)
    run = RunDirectory(Path(recipe.paths.runs) / recipe.name, writes=dist.get_rank() == 0)
    decided_by_first_rank(lambda: str(prepare_run(recipe)))
    return StageRun(recipe, run, collection)


def run_stage(recipe: Recipe) -> list[dict[str, Any]]:
    """Run a stage to its end; returns its metrics."""
    stage = opened(recipe)
    stage.run()
    dist.barrier()
    groups.destroy(keep_world=True)
    return read_lines(stage.directory.path / "metrics.jsonl")


def whole_schedule(folder: str) -> dict[str, Any]:
    """Data, base, all stages and one longer run; losses of every run."""
    if int(groups_rank()) == 0:
        build_data(Path(folder) / "data" / "tiny")
    losses = {}
    for recipe, *extra in (*SCHEDULE, (*LONG_RUN, "name=long")):
        stage = composed(folder, recipe, *extra)
        groups.initialise(stage.parallel, seed=0)
        dist.barrier()
        groups.destroy(keep_world=True)
        losses[stage.name] = [line["loss"] for line in run_stage(stage)]
    return losses


def groups_rank() -> str:
    """This process's rank, known before torch.distributed is set up."""
    import os

    return os.environ["RANK"]


def skewed(stage: StageRun, step: int) -> list[MicroBatch]:
    """A step's samples dealt so that no modality but text is on two ranks.

    Pictures and videos go to rank 0; speech and sounds to the last rank; every rank has two
    micro-batches, of which the second may be empty.
    """
    module = stage.module
    rows = stage.samples.rows(stage.timeline.step(step))
    reader = SampleReader(
        reading_job(stage.recipe, stage.samples, stage.tokenizer, module.feature_folders())
    )
    samples = [reader.read(int(row)) for row in rows]
    last = module.data_ranks - 1

    def rank_of(group: str, index: int) -> int:
        return {"image": 0, "video": 0, "speech": last, "audio": last}.get(
            group, index % (last + 1)
        )

    mine = [s for i, s in enumerate(samples) if rank_of(s.group, i) == module.data_rank]
    half = [s for s in mine if s.group in ("image", "audio")]
    rest = [s for s in mine if s.group not in ("image", "audio")]
    pad, multiple = stage.tokenizer.pad, stage.recipe.data.pad_to
    return [collate(half, pad, multiple), collate(rest, pad, multiple)]


def few_steps(
    folder: str, recipe: str, extra: list[str], deal: str = "balanced", steps: int = 3
) -> list[list[float]]:
    """Loss and gradient norm of a few steps that nothing is recorded of."""
    stage = opened(composed(folder, recipe, "name=scratch", *extra))
    module = stage.module
    log = []
    with stage.pool(stage.samples) as pool:
        feed = stage.feed(pool)
        for step in range(steps):
            batches = skewed(stage, step) if deal == "skewed" else feed.read(step)
            result = train_step(module, batches, step)
            total = result.sums.sum(0)
            log.append([(total[0] / total[1]).item(), result.grad_norm])
    dist.barrier()
    groups.destroy(keep_world=True)
    if dist.get_rank() == 0:
        shutil.rmtree(stage.directory.path, ignore_errors=True)
    dist.barrier()
    return log


def layouts(folder: str, cases: dict[str, Any]) -> dict[str, Any]:
    """``few_steps`` for every case: name -> its arguments."""
    return {name: few_steps(folder, **case) for name, case in cases.items()}


def resumed(folder: str, extra: Sequence[str] = (), name: str = "") -> dict[str, Any]:
    """A stage-3 run in one go, and one stopped after two of four steps and started again."""
    whole = run_stage(composed(folder, "stage3", f"name={name}whole", *extra))
    return {
        "whole": [(line["loss"], line["grad_norm"]) for line in whole],
        "parts": stopped_and_resumed(folder, "stage3", f"{name}parts", *extra),
    }


def stopped_and_resumed(
    folder: str, recipe_name: str, name: str, *extra: str
) -> list[tuple[float, float]]:
    """Losses and gradient norms of a run that stops at its first checkpoint and starts again."""
    stage = opened(composed(folder, recipe_name, f"name={name}", *extra))

    class StoppedError(Exception):
        pass

    save = stage._save

    def save_and_stop(step: int, best: bool = False) -> None:
        save(step, best)
        stage.saver.wait()
        raise StoppedError

    stage._save = save_and_stop  # type: ignore[method-assign]
    try:
        stage.run()
        raise AssertionError("the run was not stopped")
    except StoppedError:
        pass
    dist.barrier()
    groups.destroy(keep_world=True)
    parts = run_stage(composed(folder, recipe_name, f"name={name}", *extra))
    return [(line["loss"], line["grad_norm"]) for line in parts]
