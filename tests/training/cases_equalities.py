"""One global batch, computed by any layout, cut into micro-batches in any way."""

from __future__ import annotations

import itertools
import os
import random
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from data_pipeline.reading.collate import MicroBatch, collate
from data_pipeline.reading.sample import Sample
from tests.training.cases_stages import SCHEDULE, composed, opened, run_stage, skewed
from tests.workspace import build_data
from unimoe_mcore.config.parallel import microbatch_multiple
from unimoe_mcore.evaluation.choices import ChoiceRecorder
from unimoe_mcore.runtime import groups
from unimoe_mcore.training.stage import StageRun
from unimoe_mcore.training.step import train_step

WORLD = "model.language.blocks=4"
"""Enough blocks for two stages of two pieces each."""


def build_world(folder: str) -> None:
    """Data, base, stage 1 and the experts of the tiny world, with four blocks."""
    if os.environ["RANK"] == "0":
        build_data(Path(folder) / "data" / "tiny")
    for recipe, *extra in SCHEDULE[:-1]:
        stage = composed(folder, recipe, *extra, WORLD, "trainer.evaluation.after=false")
        groups.initialise(stage.parallel, seed=0)
        dist.barrier()
        groups.destroy(keep_world=True)
        run_stage(stage)


def run_cases(folder: str, cases: dict[str, Any]) -> dict[str, Any]:
    """``run_case`` for every case: name -> its arguments."""
    return {name: run_case(folder, **case) for name, case in cases.items()}


def run_case(
    folder: str,
    recipe: str,
    extra: list[str],
    cut: str = "dealt",
    seed: int = 0,
    steps: int = 5,
    choices: bool = True,
) -> dict[str, Any]:
    """A few steps that nothing is recorded of.

    Args:
        extra: Hydra overrides.
        cut: how a step's samples become micro-batches: as ``dealt``; ``skewed`` (no modality but
            text on two ranks); in ``rows`` of one sample each; ``shuffled`` by ``seed``, within
            this rank.
        choices: also record which experts every token chose.

    Returns:
        ``losses`` and ``norms`` of every step, ``microbatches`` of the first one, and this rank's
        ``choices`` of every step.
    """
    stage = opened(composed(folder, recipe, "name=scratch", *extra))
    found: dict[str, Any] = {"losses": [], "norms": [], "choices": [], "microbatches": 0}
    with stage.pool(stage.samples) as pool:
        feed = stage.feed(pool)
        for step in range(steps):
            if cut == "skewed":
                batches = even(stage, skewed(stage, step))
            else:
                batches = even(stage, recut(stage, feed.read(step), cut, f"{seed} {step}"))
            with ChoiceRecorder(stage.module.chunks) as recorder:
                result = train_step(stage.module, batches, step)
            total = result.sums.sum(0)
            found["losses"].append((total[0] / total[1]).item())
            found["norms"].append(result.grad_norm)
            found["choices"].append(recorder.choices(batches) if choices else {})
            found["microbatches"] = found["microbatches"] or len(batches)
    dist.barrier()
    groups.destroy(keep_world=True)
    if dist.get_rank() == 0:
        shutil.rmtree(stage.directory.path, ignore_errors=True)
    dist.barrier()
    return found


def recut(stage: StageRun, batches: list[MicroBatch], cut: str, seed: str) -> list[MicroBatch]:
    """This rank's samples in other micro-batches."""
    if cut == "dealt":
        return batches
    samples = [sample for batch in batches for sample in batch.samples]
    if cut == "rows":
        return [packed(stage, [sample]) for sample in samples]
    draw = random.Random(seed)
    draw.shuffle(samples)
    places = sorted(draw.sample(range(1, len(samples)), draw.randint(0, 3)))
    bounds = [0, *places, len(samples)]
    return [packed(stage, samples[a:b]) for a, b in itertools.pairwise(bounds)]


def even(stage: StageRun, batches: list[MicroBatch]) -> list[MicroBatch]:
    """As many micro-batches on every rank, and as many as the schedule can take."""
    count = torch.tensor(len(batches))
    dist.all_reduce(count, op=dist.ReduceOp.MAX)
    multiple = microbatch_multiple(stage.recipe.parallel)
    wanted = -(-int(count) // multiple) * multiple
    return [*batches, *(packed(stage, []) for _ in range(wanted - len(batches)))]


def packed(stage: StageRun, samples: list[Sample]) -> MicroBatch:
    """A row of some samples."""
    return collate(samples, stage.tokenizer.pad, stage.recipe.data.pad_to)
