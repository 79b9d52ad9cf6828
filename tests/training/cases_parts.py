"""Runs inside the processes of ``run_distributed``: adapters, parts with rates, trained encoders."""

from __future__ import annotations

import shutil
from typing import Any

import torch
import torch.distributed as dist

from tests.training.cases_stages import composed, opened
from unimoe_mcore.checkpoints.store import sharded_tensors
from unimoe_mcore.model.initialise import name_seed
from unimoe_mcore.runtime import groups
from unimoe_mcore.training.schedule import learning_rate
from unimoe_mcore.training.stage import StageRun
from unimoe_mcore.training.step import train_step


def fill_adapters(stage: StageRun) -> None:
    """Give both halves of every adapter values by name, the same in every layout.

    A fresh adapter has B = 0, and then A has no gradient that could be wrong.
    """
    for chunk in stage.module.chunks:
        for tensor in sharded_tensors(chunk.sharded_state_dict()):
            if ".lora_" not in tensor.key:
                continue
            generator = torch.Generator().manual_seed(name_seed(7, tensor.key))
            whole = torch.randn(tuple(tensor.global_shape), generator=generator) * 0.2
            assert tensor.data is not None
            with torch.no_grad():
                tensor.data.copy_(whole[tensor.global_slice()])
    stage.module.optimizer.reload_model_params()


def steps_of(stage: StageRun, steps: int, first: int = 0) -> list[list[float]]:
    """Loss and gradient norm of a few steps."""
    log = []
    with stage.pool(stage.samples) as pool:
        feed = stage.feed(pool)
        for step in range(first, first + steps):
            result = train_step(
                stage.module, feed.read(step), learning_rate(step, stage.recipe.trainer)
            )
            total = result.sums.sum(0)
            log.append([(total[0] / total[1]).item(), result.grad_norm])
    return log


def apart(stage: StageRun) -> list[str]:
    """Names of tensors whose replicas on different ranks are not bitwise equal."""
    mine: dict[str, Any] = {}
    for chunk in stage.module.chunks:
        for tensor in sharded_tensors(chunk.sharded_state_dict()):
            place = f"{tensor.key} {tuple(tensor.global_offset)}"
            assert tensor.data is not None
            mine[place] = tensor.data.detach().double().sum().item().hex() + (
                tensor.data.detach().double().square().sum().item().hex()
            )
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, mine)
    seen: dict[str, set[str]] = {}
    for rank in everywhere:
        for place, value in rank.items():
            seen.setdefault(place, set()).add(value)
    return sorted(place for place, values in seen.items() if len(values) > 1)


def closed(stage: StageRun) -> None:
    """Leave the layout and forget the run."""
    dist.barrier()
    groups.destroy(keep_world=True)
    if dist.get_rank() == 0:
        shutil.rmtree(stage.directory.path, ignore_errors=True)
    dist.barrier()


def adapters(folder: str, layouts: dict[str, list[str]]) -> dict[str, Any]:
    """Three steps of stage 3 from filled adapters in every layout."""
    results = {}
    for name, layout in layouts.items():
        stage = opened(composed(folder, "stage3", "name=scratch", *layout))
        fill_adapters(stage)
        results[name] = {"log": steps_of(stage, 3), "apart": apart(stage)}
        closed(stage)
    return results
