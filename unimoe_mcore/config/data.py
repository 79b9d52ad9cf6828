"""Which samples a run draws, and how a step is cut."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class ShuffleConfig:
    """Quality of the shuffle against locality of the reads (``benchmarks/shuffle_locality.py``).

    Attributes:
        block: consecutive samples of a shard that are read near each other.
        window: blocks whose samples are mixed; a dataset of at most ``block * window`` samples is
            shuffled as a whole.
    """

    block: int = 64
    window: int = 256


@dataclass
class PlanChange:
    """What the plan changes from a step on; what is not given stays as it was before.

    Attributes:
        step: the first step that is drawn the new way. A change of the data themselves is
            declared with the step alone.
        datasets: takes the place of ``data.datasets``.
        combinations: takes the place of ``data.combinations``.
        temperature: takes the place of ``data.temperature``.
        compose: takes the place of ``data.compose``.
        global_samples: takes the place of ``data.global_samples``.
    """

    step: int = 0
    datasets: dict[str, float] | None = None
    combinations: dict[str, float] | None = None
    temperature: float | None = None
    compose: str | None = None
    global_samples: int | None = None


@dataclass
class DataConfig:
    """Data of one run.

    Attributes:
        folder: a built set: shards, indexes, ``manifest.json``; a folder or an address such as
            ``https://...`` or ``s3://...``.
        datasets: dataset -> multiplier of its share; a dataset that is not named is not drawn.
        combinations: combination (``image+text``) -> multiplier of the share of all its samples;
            1 where it is not named.
        missing: what to do about a named dataset that the folder does not have: ``refuse``, or
            ``skip`` it (the quickstart, where packages could not be fetched).
        temperature: shares are ``multiplier * size ** temperature``.
        global_samples: samples a step, over all ranks.
        sample_tokens: most tokens of a sample, media included. Of a longer one the end is cut off
            behind its last medium; one whose media leave no room for an answer is left out
            (quarantine). 0: no bound; what is longer than a row is then refused.
        tokens_per_microbatch: most tokens of one packed row.
        pad_to: row lengths are rounded up to a multiple of this, tokens.
        compose: what a step holds: ``mixed`` (every step is close to the mixture) or ``uniform``
            (every step holds one combination).
        deal: who takes it: ``balanced`` (any rank takes anything, by cost) or ``sharded`` (ranks
            own combinations and hold only the encoders that these need).
        costs: what dealing goes by: ``estimate`` (operations counted from the recipe), or a file
            that ``python -m unimoe_mcore.calibrate`` measured.
        seed: of the order.
        shuffle: of the order.
        changes: steps at which the plan changes.
        workers: processes per rank that read and decode ahead; 0 does it in the training process.
        prefetch: steps that workers read ahead.
        sample_seconds: longest that decoding one sample may take, seconds.
        quarantine_most: largest share of the samples drawn so far that may be broken; a handful
            always may.
        cache_bytes: most bytes of remote shards kept on a machine (in ``paths.scratch``).
        evaluation_datasets: datasets that held-out questions may come from; empty for all of the
            split.
    """

    folder: str = "data/quickstart"
    datasets: dict[str, float] = field(default_factory=dict)
    combinations: dict[str, float] = field(default_factory=dict)
    missing: str = "refuse"
    temperature: float = 0.5
    global_samples: int = 48
    sample_tokens: int = 0
    tokens_per_microbatch: int = 2048
    pad_to: int = 128
    compose: str = "mixed"
    deal: str = "balanced"
    costs: str = "estimate"
    seed: int = 0
    shuffle: ShuffleConfig = field(default_factory=ShuffleConfig)
    changes: list[PlanChange] = field(default_factory=list)
    workers: int = 0
    prefetch: int = 2
    sample_seconds: float = 60.0
    quarantine_most: float = 0.01
    cache_bytes: int = 100_000_000_000
    evaluation_datasets: list[str] = field(default_factory=list)
