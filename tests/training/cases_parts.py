"""Runs inside the processes of ``run_distributed``: adapters, rates of parts, live encoders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.training.cases_stages import composed, opened, run_stage, skewed, stopped_and_resumed
from unimoe_mcore.checkpoints.giving import give
from unimoe_mcore.checkpoints.pieces import sharded_tensors
from unimoe_mcore.checkpoints.store import ShardReader
from unimoe_mcore.checkpoints.trained import MODEL, checkpoint_pieces, owned_by
from unimoe_mcore.model.initialise import name_seed
from unimoe_mcore.runtime import groups
from unimoe_mcore.training.announcement import announce
from unimoe_mcore.training.stage import StageRun
from unimoe_mcore.training.step import train_step


def together(folder: str, calls: list[tuple[str, dict[str, Any]]]) -> list[Any]:
    """Several of the functions below in one launch."""
    return [globals()[name](folder, **arguments) for name, arguments in calls]


def layouts(folder: str, cases: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """``few_steps`` for every case: name -> its arguments."""
    return {name: few_steps(folder, **case) for name, case in cases.items()}


def few_steps(
    folder: str,
    recipe: str,
    extra: list[str],
    steps: int = 3,
    deal: str = "balanced",
    save: str = "",
    load: str = "",
) -> dict[str, Any]:
    """Some steps from filled adapters, and what they did.

    Args:
        deal: ``skewed`` to deal modalities apart.
        save: name of a run to leave behind, with a checkpoint before the last step.
        load: name of such a run to go on from, for one step.
    """
    stage = opened(composed(folder, recipe, f"name={save or 'scratch'}", *extra))
    module, first = stage.module, 0
    fill_adapters(stage)
    if load:
        first, steps = _taken_up(stage, load), 1
    before, log = whole(stage), []
    with stage.pool(stage.samples) as pool:
        feed = stage.feed(pool)
        for step in range(first, first + steps):
            if save and step == first + steps - 1:
                stage._save(step)
            batches = skewed(stage, step) if deal == "skewed" else feed.read(step)
            result = train_step(module, batches, step)
            total = result.sums.sum(0)
            log.append([(total[0] / total[1]).item(), result.grad_norm])
    moved = {name: (v - before[name]).abs().max().item() for name, v in whole(stage).items()}
    facts = {
        "log": log,
        "apart": apart(stage),
        "moved": moved,
        "cached": [m for m, where in module.feature_folders().items() if where is not None],
        "types": sorted({str(p.dtype) for c in module.chunks for p in c.parameters()}),
        "rounded": _rounded(stage),
    }
    stage.saver.wait()
    closed(stage, forget=not save)
    return facts


def _taken_up(stage: StageRun, run: str) -> int:
    """Load the checkpoint of another run as if it were this one's; steps that are done."""
    if dist.get_rank() == 0:
        source = stage.directory.path.parent / run / "checkpoints"
        shutil.copytree(source, stage.directory.checkpoints, dirs_exist_ok=True)
    dist.barrier()
    return stage._resume()


def _rounded(stage: StageRun) -> bool:
    """Whether every trained weight is its fp32 main weight, rounded."""
    owned = owned_by(stage.module.optimizer)
    weights = [p for c in stage.module.chunks for p in c.parameters() if p.requires_grad]
    return all(torch.equal(p, owned[p].main.to(p.dtype)) for p in weights)


def fill_adapters(stage: StageRun) -> None:
    """Give both halves of every adapter values by name, the same in every layout.

    A fresh adapter has B = 0, and then A has no gradient that could be wrong.
    """
    for chunk in stage.module.chunks:
        for tensor in sharded_tensors(chunk.sharded_state_dict()):
            if ".lora_" not in tensor.key:
                continue
            generator = torch.Generator().manual_seed(name_seed(7, tensor.key))
            values = torch.randn(tuple(tensor.global_shape), generator=generator) * 0.2
            assert tensor.data is not None
            with torch.no_grad():
                tensor.data.copy_(values[tensor.global_slice()])
    stage.module.optimizer.reload_model_params()


def whole(stage: StageRun) -> dict[str, torch.Tensor]:
    """This rank's trained parameters (fp32) by name and place."""
    pieces = checkpoint_pieces(stage.module.chunks, stage.module.optimizer)
    return {
        f"{piece.name} {piece.offset}": piece.data.detach().clone()
        for piece in pieces
        if piece.name.startswith(f"{MODEL}.")
    }


def apart(stage: StageRun) -> list[str]:
    """Names of trained tensors whose replicas on different ranks are not bitwise equal."""
    mine = {
        place: (value.double().sum().item().hex(), value.double().square().sum().item().hex())
        for place, value in whole(stage).items()
    }
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, mine)
    seen: dict[str, set[Any]] = {}
    for rank in everywhere:
        for place, value in rank.items():
            seen.setdefault(place, set()).add(value)
    return sorted(place for place, values in seen.items() if len(values) > 1)


def closed(stage: StageRun, forget: bool = True) -> None:
    """Leave the layout; with ``forget`` remove what was recorded."""
    dist.barrier()
    groups.destroy(keep_world=True)
    if forget and dist.get_rank() == 0:
        shutil.rmtree(stage.directory.path, ignore_errors=True)
    dist.barrier()


def rates(folder: str, extra: list[str]) -> dict[str, Any]:
    """Rate and weight decay of every trained parameter after one step, and the records."""
    stage = opened(composed(folder, "stage3", "name=rates", *extra))
    with stage.pool(stage.samples) as pool:
        result = train_step(stage.module, stage.feed(pool).read(0), 0)
    owned = owned_by(stage.module.optimizer)
    held = {
        owned[parameter].main: str(chunk_state[name].key)
        for chunk in stage.module.chunks
        for chunk_state in (chunk.sharded_state_dict(),)
        for name, parameter in chunk.named_parameters()
        if parameter.requires_grad
    }
    given = {
        held[parameter]: [group["lr"], group["weight_decay"]]
        for group in stage.module.optimizer.param_groups
        for parameter in group["params"]
    }
    announce(stage.recipe, stage.directory, stage.module, stage.precision, stage.peak)
    dist.barrier()
    facts = {
        "given": given,
        "lr": result.lr,
        "lrs": result.lrs,
        "parameters": json.loads(stage.directory.parameters.read_text()),
    }
    closed(stage)
    return facts


def merged(folder: str, extra: list[str], recipe: str = "stage3") -> dict[str, Any]:
    """Logits of an adapted model, and of one without adapters made of what it gave merged."""
    stage = opened(composed(folder, recipe, "name=adapted", "stage.lora.merge=true", *extra))
    fill_adapters(stage)
    wanted, plain = _logits(stage), Path(folder) / "merged"
    module = stage.module
    give(plain, stage.recipe, module.chunks, stage.sources, "", stage.tokenizer)
    closed(stage)
    rest = "[router, connectors]" if recipe == "stage3" else "[connectors]"
    bare = ["stage.lora.targets=[]", f"stage.train={rest}"]
    stage = opened(composed(folder, recipe, "name=merged", *bare, *extra))
    fresh, reader = _logits(stage), ShardReader(plain)
    for chunk in stage.module.chunks:
        for tensor in sharded_tensors(chunk.sharded_state_dict()):
            if tensor.key in reader.tensors:
                reader.fill(tensor)
    found = _logits(stage)
    closed(stage)
    return {
        "difference": (found - wanted).abs().max().item(),
        "adapted": (fresh - wanted).abs().max().item(),
        "largest": wanted.abs().max().item(),
        "adapters": [name for name in reader.tensors if ".lora_" in name],
    }


@torch.no_grad()
def _logits(stage: StageRun) -> torch.Tensor:
    """Of this rank's samples of the first step."""
    with stage.pool(stage.samples) as pool:
        batches = stage.feed(pool).read(0)
    return torch.cat([stage.module.chunks[0](batch, with_loss=False)[0] for batch in batches])


ENCODERS = "stage.train=[connectors, encoder.image, encoder.speech]"


def encoder_stages(folder: str) -> dict[str, Any]:
    """Encoders trained in stage 1, with and without a stop, and taken up by later stages."""
    started = run_stage(composed(folder, "stage1", "name=seeing", ENCODERS))
    parts = stopped_and_resumed(folder, "stage1", "seeing-parts", ENCODERS)
    runs = Path(folder) / "runs"
    first = _encoder(runs / "seeing" / "gives")
    later = [f"stage.start={runs}/seeing/gives", "stage.expert=image", "name=seeing-expert"]
    stage = opened(composed(folder, "stage2", *later))
    tower = next(tower for tower in stage.module.towers() if tower.name == "image")
    facts: dict[str, Any] = {
        "whole": [(line["loss"], line["grad_norm"]) for line in started],
        "parts": parts,
        "resumed": _encoder(runs / "seeing-parts" / "gives") == first,
        "taken": tower.features.encoder.projection.flatten().tolist() == first,
    }
    tower.features.release()
    facts["again"] = tower.features.ready().projection.flatten().tolist() == first
    given, module = Path(folder) / "seeing-expert", stage.module
    give(given, stage.recipe, module.chunks, stage.sources, "", stage.tokenizer)
    facts["passed_on"] = _encoder(given) == first
    closed(stage)
    recipe = composed(folder, "stage1", "name=scratch")
    stage = opened(recipe)
    tower = next(tower for tower in stage.module.towers() if tower.name == "image")
    facts["untrained"] = tower.features.encoder.projection.flatten().tolist() == first
    closed(stage)
    return facts


def _encoder(gives: Path) -> list[float]:
    values: list[float] = ShardReader(gives).read("encoder.image.projection").flatten().tolist()
    return values
