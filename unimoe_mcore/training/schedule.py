"""The learning rate as a pure function of the step, so that a resumed run needs no state."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from unimoe_mcore.config.recipe import Recipe
from unimoe_mcore.config.stage import RateConfig
from unimoe_mcore.config.trainer import TrainerConfig


def learning_rate(step: int, config: TrainerConfig) -> float:
    """Linear warm-up, then cosine (Loshchilov & Hutter 2017, eq. 5) down to ``min_lr * lr``.

    Args:
        step: from 0.
    """
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return config.lr * (config.min_lr + (1 - config.min_lr) * cosine)


@dataclass(frozen=True)
class Rate:
    """What moves a group of parameters in one step.

    Attributes:
        lr: learning rate.
        weight_decay: AdamW's.
    """

    lr: float
    weight_decay: float


def rates(step: int, recipe: Recipe) -> dict[str, Rate]:
    """The rates of a step, from 0: by key of ``stage.rates``, and of all other parts under ``""``.

    A part's own rate follows the same curve, from its own warm-up to ``min_lr`` of its own height.
    """

    def rate(settings: TrainerConfig) -> Rate:
        return Rate(learning_rate(step, settings), settings.weight_decay)

    return {key: rate(settings_of(recipe, key)) for key in ("", *recipe.stage.rates)}


def settings_of(recipe: Recipe, key: str) -> TrainerConfig:
    """The trainer's settings as they are for the parts that follow a key of ``stage.rates``."""
    own, trainer = recipe.stage.rates.get(key, RateConfig()), recipe.trainer
    lr = trainer.lr * own.lr_scale if own.lr_scale is not None else own.lr
    return replace(
        trainer,
        lr=trainer.lr if lr is None else lr,
        warmup=trainer.warmup if own.warmup is None else own.warmup,
        weight_decay=trainer.weight_decay if own.weight_decay is None else own.weight_decay,
    )
