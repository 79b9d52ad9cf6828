"""Joints at which Megatron goes wrong without an error, looked at from inside of two processes."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import is_main_replica

from tests.training.cases_stages import composed, layouts, opened, run_stage
from unimoe_mcore.checkpoints.pieces import sharded_tensors
from unimoe_mcore.checkpoints.training import load_checkpoint
from unimoe_mcore.model import language
from unimoe_mcore.model.lora import Adapted
from unimoe_mcore.model.router import routers
from unimoe_mcore.runtime import groups
from unimoe_mcore.runtime.run_directory import read_lines
from unimoe_mcore.training import step
from unimoe_mcore.training.announcement import announce
from unimoe_mcore.training.module import TrainModule
from unimoe_mcore.training.stage import StageRun
from unimoe_mcore.training.step import train_step

NO_ROUTING = "trainer.evaluation.routing=false"
TENSOR = ("parallel.tensor=2", "parallel.sequence_parallel=true", NO_ROUTING)
INTERLEAVED = (
    "model.language.blocks=4", "parallel.pipeline=2", "parallel.virtual_pipeline=2", NO_ROUTING,
)  # fmt: skip


def layouts_and_guards(folder: str, cases: dict[str, Any]) -> dict[str, Any]:
    """``layouts`` and, under ``guards``, what is seen from inside."""
    found = layouts(folder, cases)
    before = _threads()
    return found | {
        "guards": {
            "tensor": _tensor(folder),
            "interleaved": _interleaved(folder),
            "adapters": _adapters_over_layouts(folder),
            "boundaries": _boundaries(folder),
            "untested": _untested(folder),
            "bad gradient": _bad_gradient(folder),
            "left": {
                "groups": len(dist.distributed_c10d._world.pg_map),
                "threads": max(_everywhere(_threads() - before)),
            },
        }
    }


def _threads() -> int:
    """Of this process, when the models of past layouts are gone."""
    gc.collect()
    return len(list(Path("/proc/self/task").iterdir()))


def references(folder: str, cases: dict[str, Any]) -> dict[str, Any]:
    """One process: a base and connectors of four blocks, ``layouts``, and held-out questions."""
    blocks, unjudged = INTERLEAVED[0], ("trainer.steps=1", "trainer.evaluation.after=false")
    run_stage(composed(folder, "base", "name=four-blocks", blocks, *unjudged))
    base = f"stage.base={folder}/runs/four-blocks/gives"
    run_stage(composed(folder, "stage1", "name=four-blocks-1", blocks, base, *unjudged))
    asked = _asked(opened(composed(folder, "base", "name=asked-1", blocks, NO_ROUTING)))
    return layouts(folder, cases) | {"asked": asked}


def _close(stage: StageRun) -> None:
    dist.barrier()
    groups.destroy(keep_world=True)


def _steps(stage: StageRun, first: int, last: int) -> list[tuple[float, float]]:
    log = []
    with stage.pool(stage.samples) as pool:
        feed = stage.feed(pool)
        for number in range(first, last):
            result = train_step(stage.module, feed.read(number), number)
            total = result.sums.sum(0)
            log.append(((total[0] / total[1]).item(), result.grad_norm))
    return log


def _everywhere(value: Any) -> list[Any]:
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def _tensor(folder: str) -> dict[str, Any]:
    """Stage 3 under TP=2 with sequence parallelism; experts are whole on both ranks."""
    stage = opened(composed(folder, "stage3", "name=guards", "parallel.expert=1", *TENSOR))
    masks: list[tuple[int, int, int]] = []

    def look(_: Any, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        mask = keywords.get("padding_mask", inputs[1] if len(inputs) > 1 else None)
        masks.append((inputs[0].shape[0], mask.numel(), int(mask.sum())))

    hooks = [
        router.register_forward_pre_hook(look, with_kwargs=True)
        for _, _, router in routers(stage.module.chunks)
    ]
    with stage.pool(stage.samples) as pool:
        batches = stage.feed(pool).read(0)
        train_step(stage.module, batches, 0)
    for hook in hooks:
        hook.remove()
    writers = {
        tensor.key: int(is_main_replica(tensor.replica_id))
        for chunk in stage.module.chunks
        for tensor in sharded_tensors(chunk.sharded_state_dict())
        if tensor.key.startswith("connector.")
    }
    found = {
        "masks fit": all(tokens == places for tokens, places, _ in masks),
        "padding seen": sum(sum(padding for _, _, padding in seen) for seen in _everywhere(masks)),
        "padding": sum(int(batch.padding_mask.sum()) for batch in batches),
        "writers of a connector": sorted(
            {sum(rank[key] for rank in _everywhere(writers)) for key in writers}
        ),
        "adapters alike": _adapters_alike(stage.module),
    }
    _close(stage)
    return found


def _adapters_alike(module: TrainModule) -> bool:
    """Whether experts' adapters, whole on every rank, have the same values and the same marks."""
    values, marked = [], True
    for name, layer in module.chunks[0].named_modules():
        if isinstance(layer, Adapted) and ".experts." in name:
            for half in (layer.lora_a.weight, layer.lora_b.weight):
                values.append(half.detach().flatten())
                marked &= half.allreduce == layer.weight.allreduce
    mine = torch.cat(values)
    gathered = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, mine)
    moved = float(mine.abs().sum()) > 0
    return marked and moved and all(torch.equal(gathered[0], other) for other in gathered)


def _interleaved(folder: str) -> dict[str, Any]:
    """A base in two stages of two pieces: what its chunks answer, and held-out questions."""
    stage = opened(composed(folder, "base", "name=asked-2", *INTERLEAVED))
    answers = [
        (chunk.pre_process, chunk.post_process, chunk.vp_stage, chunk.model_type.name)
        for chunk in stage.module.chunks
    ]
    tied = [
        chunk.shared_embedding_or_output_weight().shape[0]
        for chunk in stage.module.chunks
        if chunk.pre_process or chunk.post_process
    ]
    found = {"chunks": _everywhere(answers), "tied": _everywhere(tied)}
    return found | {"asked": _asked(stage)}


def _asked(stage: StageRun) -> dict[str, float]:
    stage.evaluate("guards")
    dist.barrier()
    path: Path = stage.directory.evaluation("guards", stage.recipe.trainer.evaluation.split)
    records = [json.loads(line) for line in path.read_text().splitlines()]
    _close(stage)
    return {f"{r['dataset']} {r['key']}": r["loss"] for r in records}


def _adapters_over_layouts(folder: str) -> dict[str, Any]:
    """Adapters of gated layers saved at TP=2: the next step there, and after a load without TP."""
    speech = ("stage.expert=speech", "stage.lora.targets=[mlp]", NO_ROUTING)
    stage = opened(composed(folder, "stage2", "name=halves", *speech, *TENSOR))
    _steps(stage, 0, 2)
    stage._save(2)
    stage.saver.wait()
    dist.barrier()  # the first rank's wait is over when it is visible
    saved = stage.checkpoints.finished()[0]
    went_on = _steps(stage, 2, 3)
    _close(stage)
    stage = opened(composed(folder, "stage2", "name=halves", *speech))
    load_checkpoint(saved, stage.module.chunks, stage.module.optimizer)
    loaded = _steps(stage, 2, 3)
    _close(stage)
    return {"went on": went_on, "loaded": loaded}


def _untested(folder: str) -> list[dict[str, Any]]:
    """The event of a layout that was allowed without having been compared."""
    layout = ("parallel.expert=1", "parallel.expert_tensor=2", "parallel.allow_untested=true")
    stage = opened(composed(folder, "stage3", "name=untested", *layout, *TENSOR))
    announce(stage.recipe, stage.directory, stage.module, stage.precision, stage.peak)
    _close(stage)
    events = read_lines(stage.directory.path / "events.jsonl")
    return [event for event in events if event["event"] == "untested layout"]


def _bad_gradient(folder: str) -> list[tuple[str, bool]]:
    """What every rank says if one rank's loss is not a number, and whether its weights stayed."""
    stage = opened(composed(folder, "stage1", "name=bad", "parallel.expert=1"))
    before = [p.detach().clone() for p in stage.module.chunks[0].parameters()]
    right, bad = step._loss, dist.get_rank() == 1

    def wrong(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        total, *others = right(*arguments)
        return (total * float("nan") if bad else total, *others)

    said = "nothing"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "_loss", wrong)
        try:
            _steps(stage, 0, 1)
        except RuntimeError as error:
            said = str(error)
    after = stage.module.chunks[0].parameters()
    stayed = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    _close(stage)
    return _everywhere((said, stayed))


def _boundaries(folder: str) -> str:
    """What is said of a pattern with a boundary that the layout has not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(language, "pipeline_pattern", lambda pattern, _: "*-|*-")
        try:
            opened(composed(folder, "base", "name=bounded", NO_ROUTING))
            said = "nothing"
        except RuntimeError as error:
            said = str(error)
    dist.barrier()
    groups.destroy(keep_world=True)
    return said
