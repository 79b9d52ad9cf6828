"""Checks of the parts that train at rates of their own."""

from __future__ import annotations

import math
from collections.abc import Iterator

from unimoe_mcore.config.stage import GROUPS_OF_PARTS, RateConfig, StageConfig, trains


def rate_problems(stage: StageConfig) -> Iterator[str]:
    """Everything that is wrong with ``stage.rates``, a sentence each."""
    for part, rate in stage.rates.items():
        if not _trains(stage, part):
            yield (
                f"stage.rates names {part}, which does not train: "
                f"stage.train is {', '.join(stage.train) or 'empty'}"
            )
        yield from _one(f"stage.rates.{part}", rate)


def _trains(stage: StageConfig, part: str) -> bool:
    """Whether a part trains, or any part of a group of parts."""
    group = GROUPS_OF_PARTS.get(part)
    if group is None:
        return trains(stage, part)
    return any(name == part or name.startswith(group) for name in stage.train)


def _one(key: str, rate: RateConfig) -> Iterator[str]:
    if all(value is None for value in vars(rate).values()):
        yield f"{key} is empty, it must set one of {', '.join(vars(rate))}"
    if rate.lr is not None and rate.lr_scale is not None:
        yield f"{key} sets lr and lr_scale, it can set only one of them"
    for name in ("lr", "lr_scale"):
        value = getattr(rate, name)
        if value is not None and not 0 < value < math.inf:
            yield f"{key}.{name} is {value}, it must be greater than 0 (do not train what stays)"
    for name in ("warmup", "weight_decay"):
        value = getattr(rate, name)
        if value is not None and not 0 <= value < math.inf:
            yield f"{key}.{name} is {value}, it must not be negative"
