"""Router warm-up: in the first steps experts stay as they are, with their optimizer state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate

from unimoe_mcore.config.recipe import Recipe
from unimoe_mcore.model.parts import part_of

_HELD = "unimoe_held"  # in a group of parameters: whether a warm-up holds it


def held(name: str) -> bool:
    """Whether a parameter is an expert's weight or an adapter on one, by its name."""
    part = part_of(name)
    return part == "experts" or (part == "lora" and ".mlp.experts." in name)


def held_group(recipe: Recipe) -> dict[ParamKey, Any]:
    """A group of its own in Megatron's optimizer for what the warm-up holds."""
    if not recipe.model.moe.router_warmup:
        return {}
    predicate = ParamWithNamePredicate(name=_HELD, fn=lambda _, name: held(name))
    return {ParamKey(with_name_predicate=predicate): {_HELD: True}}


def hold_experts(
    recipe: Recipe, chunks: Sequence[DistributedDataParallel], optimizer: Any, step: int
) -> None:
    """In a step of the warm-up, take from the experts all that would move them.

    Without gradients Adam's moments stay zero, and the experts do not count in the gradient norm;
    without a learning rate weight decay does nothing. Adam's count of steps goes on.

    Args:
        chunks: wrapped, with the step's gradients.
        step: from 0.
    """
    if step >= recipe.model.moe.router_warmup:
        return
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            if parameter.requires_grad and held(name):
                parameter.main_grad.zero_()
    for group in optimizer.param_groups:
        if group.get(_HELD):
            group["lr"] = 0.0
