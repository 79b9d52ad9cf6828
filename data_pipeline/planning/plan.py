"""The global plan: which samples make step t, whoever reads them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from data_pipeline.planning.mixture import Schedule, temperature_weights


class Draw(NamedTuple):
    """One planned sample: the dataset's number, the sample's row in it, and the epoch."""

    dataset: int
    row: int
    epoch: int


@dataclass(frozen=True)
class DatasetShare:
    """A dataset as the plan sees it.

    Attributes:
        name: its name in the manifest.
        count: its samples.
        factor: the recipe's multiplier.
        digest: identifies its content (from the shards' checksums).
    """

    name: str
    count: int
    factor: float
    digest: str


@lru_cache(maxsize=64)
def _permutation(seed: int, dataset: str, epoch: int, count: int) -> np.ndarray:
    """Order of a dataset in one epoch. Has a generator of its own: nobody else's draws move it."""
    salt = int.from_bytes(hashlib.sha256(dataset.encode()).digest()[:8], "little")
    return np.random.Generator(np.random.PCG64([seed, salt, epoch])).permutation(count)


@dataclass(frozen=True)
class GlobalPlan:
    """Samples of every step as a pure function of seed, mixture and step number.

    Neither ranks, workers nor restarts enter: a step is ``global_samples`` samples, and the plan's
    whole state is the number of the next step. Within a dataset every sample is used once an
    epoch; a remainder is carried into the next step, never dropped.

    Attributes:
        datasets: what is mixed, in the recipe's order.
        seed: of the order.
        global_samples: samples a step.
        temperature: exponent of the sizes in the mixture.
        compose: ``mixed``: every step is close to the mixture.
    """

    datasets: tuple[DatasetShare, ...]
    seed: int
    global_samples: int
    temperature: float
    compose: str = "mixed"
    _schedule: Schedule = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_schedule", Schedule.of(self.weights()))

    def weights(self) -> list[float]:
        """Share of each dataset in the drawn samples."""
        return temperature_weights(
            [share.count for share in self.datasets],
            [share.factor for share in self.datasets],
            self.temperature,
        )

    def step(self, step: int) -> list[Draw]:
        """The samples of step ``step`` (from 0), in the plan's order. O(1) in ``step``."""
        start = step * self.global_samples
        return [self._draw(position) for position in range(start, start + self.global_samples)]

    def _draw(self, position: int) -> Draw:
        dataset, cursor = self._schedule.draw(position)
        share = self.datasets[dataset]
        epoch, place = divmod(cursor, share.count)
        order = _permutation(self.seed, share.name, epoch, share.count)
        return Draw(dataset, int(order[place]), epoch)

    def fingerprint(self) -> str:
        """SHA-256 over everything that decides the order; a resumed run must have the same."""
        facts = {
            "datasets": [(s.name, s.count, s.factor, s.digest) for s in self.datasets],
            "seed": self.seed,
            "global_samples": self.global_samples,
            "temperature": self.temperature,
            "compose": self.compose,
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def epochs(plan: GlobalPlan, steps: int) -> dict[str, float]:
    """How many times ``steps`` steps go through each dataset."""
    drawn = [0] * len(plan.datasets)
    blocks, rest = divmod(steps * plan.global_samples, len(plan._schedule.order))
    for dataset, quota in enumerate(plan._schedule.quota):
        drawn[dataset] += blocks * quota
    for dataset in plan._schedule.order[:rest]:
        drawn[int(dataset)] += 1
    return {s.name: n / s.count for s, n in zip(plan.datasets, drawn, strict=True)}


def plan_difference(saved: Sequence[str], now: Sequence[str]) -> str:
    """The datasets that one plan has and the other has not, as words for a message."""
    gone, new = sorted(set(saved) - set(now)), sorted(set(now) - set(saved))
    parts = [f"without {', '.join(gone)}"] if gone else []
    parts += [f"with {', '.join(new)} added"] if new else []
    return " and ".join(parts) or "with the same datasets but other weights, seed or content"
