"""Which samples a run draws, and how a step is cut."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class DataConfig:
    """Data of one run.

    Attributes:
        folder: a built set: shards, indexes, ``manifest.json``.
        datasets: dataset -> multiplier of its share; a dataset that is not named is not drawn.
        missing: what to do about a named dataset that the folder does not have: ``refuse``, or
            ``skip`` it (the quickstart, where packages could not be fetched).
        temperature: shares are ``multiplier * size ** temperature``.
        global_samples: samples a step, over all ranks.
        tokens_per_microbatch: most tokens of one packed row.
        pad_to: row lengths are rounded up to a multiple of this, tokens.
        compose: what a step holds: ``mixed`` (every step is close to the mixture).
        deal: who takes it: ``balanced`` (any rank takes anything, by cost).
        seed: of the order.
        evaluation_datasets: datasets that held-out questions may come from; empty for all of the
            split.
    """

    folder: str = "data/quickstart"
    datasets: dict[str, float] = field(default_factory=dict)
    missing: str = "refuse"
    temperature: float = 0.5
    global_samples: int = 48
    tokens_per_microbatch: int = 2048
    pad_to: int = 128
    compose: str = "mixed"
    deal: str = "balanced"
    seed: int = 0
    evaluation_datasets: list[str] = field(default_factory=list)
