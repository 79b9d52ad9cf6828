"""What a run says and records before its first step: what trains, where, in which memory."""

from __future__ import annotations

from dataclasses import asdict

import torch.distributed as dist

from unimoe_mcore.checkpoints.files import write_text
from unimoe_mcore.config.parallel import (
    TESTED,
    ParallelConfig,
    features,
    layout_words,
    tested_layouts,
)
from unimoe_mcore.config.recipe import Recipe
from unimoe_mcore.model.memory import RankMemory, recipe_memory
from unimoe_mcore.model.size import language_size
from unimoe_mcore.runtime.peak import Peak
from unimoe_mcore.runtime.run_directory import RunDirectory
from unimoe_mcore.training.inventory import as_json, by_part, table
from unimoe_mcore.training.module import TrainModule


def announce(
    recipe: Recipe, directory: RunDirectory, module: TrainModule, precision: str, peak: Peak
) -> None:
    """Say and record what trains, at which rates, what does not, and what it takes.

    Args:
        precision: number format of the computation.
        peak: operations per second of a process at most.
    """
    parts = by_part(module.inventory, trained=True)
    memory, size = _memory(recipe, module, precision), language_size(recipe)
    total, trained = sum(entry.count for entry in module.inventory), sum(parts.values())
    directory.event(
        "start",
        parameters=total,
        trained=trained,
        language={"total": size.total, "active": size.active},
        parts=parts,
        ranks=dist.get_world_size(),
        layout=asdict(recipe.parallel),
        precision=precision,
        peak=asdict(peak),
        memory=asdict(memory),
    )
    origin = recipe.stage.init_from
    if module.began_with:
        directory.event("began with", folder=origin, parts=module.began_with)
    if dist.get_rank() == 0:
        write_text(directory.parameters, as_json(module.inventory))
        _say(
            recipe.name,
            f"{total / 1e6:.2f} M parameters, {trained / 1e6:.2f} M train, "
            f"{dist.get_world_size()} processes, {layout_words(recipe.parallel)}, {precision}\n"
            f"{table(module.inventory, recipe)}",
        )
        _say(recipe.name, size.words())
        _say(recipe.name, memory.words())
        if module.began_with:
            taken = ", ".join(f"{part} {n}" for part, n in module.began_with.items())
            _say(recipe.name, f"begins with {origin}, tensors: {taken}")
    _warn_untested(recipe.name, directory, recipe.parallel)


def _memory(recipe: Recipe, module: TrainModule, precision: str) -> RankMemory:
    connectors = {
        tower.name: sum(p.numel() for p in tower.parameters()) for tower in module.towers()
    }
    stage = int(module.groups.pp.rank())
    return recipe_memory(recipe, connectors, dist.get_world_size(), stage, precision)


def _warn_untested(name: str, directory: RunDirectory, parallel: ParallelConfig) -> None:
    """Say what was tested where the layout was not."""
    if features(parallel) in TESTED:
        return
    kind, tested = " x ".join(features(parallel)), tested_layouts()
    directory.event("untested layout", layout=kind, tested=tested)
    if dist.get_rank() == 0:
        _say(
            name,
            f"the layout {kind} was never compared with one process; those that were: "
            f"{'; '.join(tested)}",
        )


def _say(name: str, what: str) -> None:
    print(f"{name}: {what}", flush=True)
