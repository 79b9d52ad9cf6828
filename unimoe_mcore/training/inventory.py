"""What a run trains and what it leaves as it is: every parameter of the whole model, by part."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from unimoe_mcore.checkpoints.pieces import sharded_tensors
from unimoe_mcore.config.recipe import Recipe
from unimoe_mcore.config.stage import rate_of
from unimoe_mcore.model.parts import part_of
from unimoe_mcore.model.towers.feature_cache import FeatureCache
from unimoe_mcore.model.unimoe import UniMoEModel
from unimoe_mcore.training.schedule import settings_of


@dataclass(frozen=True)
class Entry:
    """One parameter of the whole model, as it is called on disk.

    Attributes:
        name: experts are stacked: one entry stands for those of all ranks.
        shape: of the whole tensor, however it is divided over ranks.
        part: what a recipe calls it (``unimoe_mcore.model.parts``).
        trained: whether this run changes it.
    """

    name: str
    shape: tuple[int, ...]
    part: str
    trained: bool

    @property
    def count(self) -> int:
        """Numbers in it."""
        return math.prod(self.shape)


def take_inventory(chunks: Sequence[UniMoEModel]) -> list[Entry]:
    """Every parameter of the model once, however many ranks hold a part or a copy of it.

    A collective over all ranks.
    """
    mine = {entry.name: entry for chunk in chunks for entry in _entries(chunk)}
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, mine)
    found: dict[str, Entry] = {name: e for rank in everywhere for name, e in rank.items()}
    return sorted(found.values(), key=lambda entry: (entry.part, entry.name))


def _entries(chunk: UniMoEModel) -> Iterator[Entry]:
    state = chunk.sharded_state_dict()
    for name, parameter in chunk.named_parameters():
        for tensor in sharded_tensors({name: state[name]}):
            shape = tuple(tensor.global_shape)
            yield Entry(tensor.key, shape, part_of(name), parameter.requires_grad)
    for tower in chunk.modality_submodules.values():
        if isinstance(tower.features, FeatureCache):  # frozen: no part of the module tree
            part = f"encoder.{tower.name}"
            for name, parameter in tower.features.encoder.named_parameters():
                yield Entry(f"{part}.{name}", tuple(parameter.shape), part, False)


def by_part(inventory: Sequence[Entry], trained: bool) -> dict[str, int]:
    """Numbers in each part that trains, or in each that does not."""
    counts: dict[str, int] = {}
    for entry in inventory:
        if entry.trained == trained:
            counts[entry.part] = counts.get(entry.part, 0) + entry.count
    return counts


def as_json(inventory: Sequence[Entry]) -> str:
    """The content of ``parameters.json``."""
    trained, frozen = by_part(inventory, True), by_part(inventory, False)
    facts = {
        "total": sum(trained.values()) + sum(frozen.values()),
        "trained": sum(trained.values()),
        "trained_parts": trained,
        "frozen_parts": frozen,
        "parameters": [
            {
                "name": entry.name,
                "shape": entry.shape,
                "part": entry.part,
                "count": entry.count,
                "trained": entry.trained,
            }
            for entry in inventory
        ],
    }
    return json.dumps(facts, indent=1)


def table(inventory: Sequence[Entry], recipe: Recipe) -> str:
    """A line for every part: how large it is, and at which rates it trains."""
    trained, frozen = by_part(inventory, True), by_part(inventory, False)
    lines = []
    for part, count in trained.items():
        own = settings_of(recipe, rate_of(recipe.stage, part))
        lines.append(
            f"  {part:<18} {_millions(count)}  lr {own.lr:g}, weight decay {own.weight_decay:g}, "
            f"warm-up {own.warmup}"
        )
    lines += [f"  {part:<18} {_millions(count)}  frozen" for part, count in frozen.items()]
    return "\n".join(lines)


def _millions(count: int) -> str:
    return f"{count / 1e6:>10.3f} M"
