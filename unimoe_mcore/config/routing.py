"""Checks of what a recipe says about the router and the shared expert."""

from __future__ import annotations

import math
from collections.abc import Iterator

from unimoe_mcore.config.model import BALANCES, BALANCING_LOSSES, SCORES, MoEConfig
from unimoe_mcore.config.recipe import Recipe


def check_routing(recipe: Recipe) -> Iterator[str]:
    """What is wrong with ``model.moe`` and ``stage.shared_expert``, a sentence each."""
    moe, stage = recipe.model.moe, recipe.stage
    yield from _values(moe)
    yield from _combinations(moe)
    if stage.kind == "moe":
        yield from _training(recipe)
    elif stage.shared_expert:
        yield (
            f"stage.shared_expert is given, but only a moe stage has experts, not a {stage.kind} "
            f"stage"
        )
    if recipe.trainer.router_every < 0:
        yield f"trainer.router_every is {recipe.trainer.router_every}, it must not be negative"


def _values(moe: MoEConfig) -> Iterator[str]:
    for key, value, allowed in (("score", moe.score, SCORES), ("balance", moe.balance, BALANCES)):
        if value not in allowed:
            yield f"model.moe.{key} is {value!r}, it must be one of {', '.join(allowed)}"
    for key in ("balance_coefficient", "balance_final", "z_loss", "bias_rate", "capacity"):
        if not 0 <= getattr(moe, key) < math.inf:
            yield f"model.moe.{key} is {getattr(moe, key)}, it must not be negative"
    for key in ("balance_until", "router_warmup"):
        if getattr(moe, key) < 0:
            yield f"model.moe.{key} is {getattr(moe, key)}, it must not be negative"
    if not 0 <= moe.jitter < 1:
        yield f"model.moe.jitter is {moe.jitter}, it must be from 0 to below 1"


def _combinations(moe: MoEConfig) -> Iterator[str]:
    """Settings that would do nothing, or not what they say."""
    if moe.balance in BALANCING_LOSSES and moe.balance_coefficient == 0:
        yield (
            f"model.moe.balance={moe.balance} with model.moe.balance_coefficient=0 does nothing: "
            f"set model.moe.balance=none"
        )
    if moe.balance_final and not moe.balance_until:
        yield "model.moe.balance_final needs the step at which it is reached: balance_until"
    if moe.balance == "bias" and moe.score != "sigmoid":
        yield (
            f"model.moe.balance=bias chooses experts by score + bias, which Megatron has for "
            f"model.moe.score=sigmoid only, not {moe.score}"
        )
    if moe.balance == "bias" and not moe.bias_rate:
        yield "model.moe.balance=bias with model.moe.bias_rate=0 does nothing"
    if moe.top_k == 1 and moe.score == "softmax":
        yield (
            "model.moe.top_k=1 with model.moe.score=softmax gives every chosen expert the weight "
            "1, and the router no gradient: set model.moe.score=pre_softmax"
        )


def _training(recipe: Recipe) -> Iterator[str]:
    """The losses move the router and the warm-up waits for it: it must train."""
    moe, stage = recipe.model.moe, recipe.stage
    wants = {
        f"balance={moe.balance}": moe.balance != "none",
        f"z_loss={moe.z_loss}": moe.z_loss > 0,
        f"router_warmup={moe.router_warmup}": moe.router_warmup > 0,
    }
    for setting, wanted in wants.items():
        if wanted and "router" not in stage.train:
            yield f"model.moe.{setting} needs router in stage.train"
    adapted = "lora" in stage.train and "experts" in stage.lora.targets
    if moe.router_warmup and not (adapted or "experts" in stage.train):
        yield "model.moe.router_warmup holds the experts, but stage.train does not train them"
    if moe.router_warmup >= max(1, recipe.trainer.steps):
        yield (
            f"model.moe.router_warmup={moe.router_warmup} leaves none of trainer.steps="
            f"{recipe.trainer.steps} for the experts"
        )
    if "shared" in stage.train and not stage.shared_expert:
        yield "stage.train names shared, but stage.shared_expert is empty"
