"""The learning rate as a pure function of the step, so that a resumed run needs no state."""

from __future__ import annotations

import math

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
