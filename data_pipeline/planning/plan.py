"""The global plan: which samples make step t, whoever reads them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from data_pipeline.planning.mixture import Schedule, temperature_weights
from data_pipeline.planning.permutation import EpochOrder, Shuffle

ORDER = 2
"""Version of the rules that make an order of a description; part of every fingerprint."""

_AT_ONCE = 16_384
"""Samples: smaller steps are planned together, since fewer at once would take as long."""


@dataclass(frozen=True)
class Source:
    """The samples of one combination in one dataset, as the plan sees them.

    Attributes:
        dataset: its dataset's name in the manifest.
        combination: the modalities of its samples.
        count: its samples, at least 1.
        digest: identifies its content (from the shards' checksums).
    """

    dataset: str
    combination: str
    count: int
    digest: str

    @property
    def name(self) -> str:
        """What its order and its cursor are known by: other content is another source."""
        return f"{self.dataset}/{self.combination}/{self.digest[:16]}"


@dataclass(frozen=True)
class Mixture:
    """What a recipe says about the order.

    Attributes:
        datasets: dataset -> multiplier of its share; others are not drawn.
        combinations: combination -> multiplier of the share of all its sources.
        temperature: exponent of the sizes.
        global_samples: samples a step.
        compose: ``mixed`` (every step is close to the mixture) or ``uniform`` (every step holds
            one combination).
        seed: of the order.
        shuffle: locality of the reads against quality of the shuffle.
    """

    datasets: dict[str, float]
    global_samples: int
    temperature: float = 1.0
    combinations: dict[str, float] = field(default_factory=dict)
    compose: str = "mixed"
    seed: int = 0
    shuffle: Shuffle = field(default_factory=Shuffle)


@dataclass(frozen=True)
class Draws:
    """The samples of one step, in the plan's order; every array is ``[samples]`` int64.

    Attributes:
        source: number of the source.
        row: row in the source.
        epoch: how many times the source was gone through before.
    """

    source: np.ndarray
    row: np.ndarray
    epoch: np.ndarray

    def __len__(self) -> int:
        return len(self.source)


class GlobalPlan:
    """Samples of every step as a pure function of seed, mixture, composition and step number.

    Neither ranks, workers nor restarts enter, nothing is stored per sample, and any step is
    reached in O(1). Within a source every sample is used once an epoch; a remainder is carried
    into the next step, never dropped.

    Args:
        sources: what there is to draw from.
        mixture: how.
        first_step: the step from which this plan holds; earlier ones are another plan's.
        origin: how often each source was drawn before ``first_step``, by its name.

    Raises:
        DataError: the mixture draws from nothing.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        mixture: Mixture,
        first_step: int = 0,
        origin: dict[str, int] | None = None,
    ) -> None:
        self.sources = tuple(sources)
        self.mixture = mixture
        self.first_step = first_step
        self.origin = {name: n for name, n in (origin or {}).items() if n}
        self.weights = self._weights()
        self._before = np.array([self.origin.get(s.name, 0) for s in self.sources], dtype=np.int64)
        self._order = EpochOrder(
            [source.count for source in self.sources],
            [source.name for source in self.sources],
            mixture.seed,
            mixture.shuffle,
        )
        # Sources are drawn from one stream; `uniform` has a stream per combination and draws the
        # stream of each step.
        names = [source.combination for source in self.sources]
        if mixture.compose == "mixed":
            names = ["all"] * len(names)
        drawn = [name for name, w in zip(names, self.weights, strict=True) if w > 0]
        self.streams = tuple(dict.fromkeys(drawn))
        members = [
            np.array([w if name == stream else 0.0 for name, w in zip(names, self.weights)])  # noqa: B905
            for stream in self.streams
        ]
        self._of_step = Schedule.of([float(weights.sum()) for weights in members])
        self._of_stream = [Schedule.of(list(weights / weights.sum())) for weights in members]
        self._steps_at_once = max(1, _AT_ONCE // mixture.global_samples)
        # Bound to the instance, so that it goes with it; the last stretch of every stream.
        self._stretch: Callable[[int, int], Draws] = lru_cache(len(members))(self._find_stretch)

    def _weights(self) -> list[float]:
        """Share of each source in the drawn samples."""
        mixture, size = self.mixture, dict[str, int]()
        for source in self.sources:
            size[source.dataset] = size.get(source.dataset, 0) + source.count
        # The temperature is the datasets'; inside one, combinations are drawn by their sizes.
        shares = temperature_weights(
            list(size.values()),
            [mixture.datasets.get(name, 0.0) for name in size],
            mixture.temperature,
        )
        share = dict(zip(size, shares, strict=True))
        return temperature_weights(
            [1] * len(self.sources),
            [
                share[s.dataset]
                * (s.count / size[s.dataset])
                * mixture.combinations.get(s.combination, 1.0)
                for s in self.sources
            ],
            1.0,
        )

    def stream(self, step: int) -> tuple[int, int]:
        """The stream that a step draws from, and how many steps drew from it before."""
        stream, before = self._of_step.draw(np.array([step - self.first_step]))
        return int(stream[0]), int(before[0])

    def step(self, step: int) -> Draws:
        """The samples of step ``step`` (from ``first_step``), in the plan's order. O(1)."""
        stream, before = self.stream(step)
        stretch, number = divmod(before, self._steps_at_once)
        samples = self.mixture.global_samples
        part = slice(number * samples, (number + 1) * samples)
        draws = self._stretch(stream, stretch)
        return Draws(draws.source[part], draws.row[part], draws.epoch[part])

    def _find_stretch(self, stream: int, stretch: int) -> Draws:
        """The samples of some consecutive steps of a stream."""
        length = self._steps_at_once * self.mixture.global_samples
        positions = np.arange(stretch * length, (stretch + 1) * length)
        source, cursor = self._of_stream[stream].draw(positions)
        row, epoch = self._order.samples(source, cursor + self._before[source])
        return Draws(source, row, epoch)

    def cursors(self, step: int) -> dict[str, int]:
        """How often each source has been drawn before ``step``, by its name; zeros left out."""
        drawn = self._before.copy()
        steps = self._of_step.drawn(step - self.first_step)
        for schedule, count in zip(self._of_stream, steps, strict=True):
            drawn += schedule.drawn(int(count) * self.mixture.global_samples)
        counted = {s.name: int(n) for s, n in zip(self.sources, drawn, strict=True) if n}
        return {**self.origin, **counted}

    def epochs(self, step: int) -> dict[str, float]:
        """How many times each source has been gone through before ``step``."""
        cursors = self.cursors(step)
        return {s.name: cursors.get(s.name, 0) / s.count for s in self.sources}

    def description(self) -> dict[str, Any]:
        """All that decides the order, as JSON values."""
        facts = asdict(self.mixture)
        for key in ("datasets", "combinations"):
            facts[key] = {name: float(factor) for name, factor in facts[key].items()}
        facts["temperature"] = float(facts["temperature"])
        facts["sources"] = [
            [source.dataset, source.combination, source.count, source.digest]
            for source, weight in zip(self.sources, self.weights, strict=True)
            if weight > 0
        ]
        return {
            **facts,
            "order": ORDER,
            "first_step": self.first_step,
            "origin": self.origin,
        }

    def fingerprint(self) -> str:
        """SHA-256 over everything that decides the order; a resumed run must have the same."""
        return fingerprint_of(self.description())


def fingerprint_of(description: dict[str, Any]) -> str:
    """SHA-256 over what ``GlobalPlan.description`` gives, also after a way through JSON."""
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()
