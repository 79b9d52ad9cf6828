"""What a recipe makes of a data set: what it draws, in samples and in tokens, and how it fits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from data_pipeline.inspection.contents import few_modalities_first
from data_pipeline.modalities import MODALITIES
from data_pipeline.planning.catalogue import Catalogue
from data_pipeline.planning.cost import CostModel
from data_pipeline.planning.dealer import Dealer
from data_pipeline.planning.dealing import Ranks
from data_pipeline.planning.permutation import Shuffle
from data_pipeline.planning.plan import GlobalPlan, Mixture
from data_pipeline.planning.timeline import Timeline
from data_pipeline.shards.schema import MIXED
from unimoe_mcore.config.data import DataConfig
from unimoe_mcore.config.recipe import Recipe

_STEPS = 64
"""Steps that are dealt to see what fits, at most ..."""
_DEALT = 400_000
"""... and samples in them, unless a single step has more."""


@dataclass(frozen=True)
class Drawn:
    """One source in one phase; what is per step is so on average.

    Attributes:
        dataset: its dataset.
        combination: its combination.
        count: samples that it has.
        share: of all samples drawn.
        samples: per step.
        tokens_each: language-model tokens of a sample, media included, on average.
        longest: tokens of the longest sample.
        tokens: per step.
        token_share: of all tokens.
        epochs: how often it has been gone through by the end of the phase, earlier ones included.
        work: modality -> pictures, frames or seconds that its encoder computes per step.
        encoder_share: of the costs of all encoders; None where no costs are known.
    """

    dataset: str
    combination: str
    count: int
    share: float
    samples: float
    tokens_each: float
    longest: int
    tokens: float
    token_share: float
    epochs: float
    work: dict[str, float]
    encoder_share: float | None


@dataclass(frozen=True)
class Layout:
    """How steps are dealt to the recipe's ranks.

    Attributes:
        deal: ``balanced`` or ``sharded``.
        ranks: data-parallel ranks.
        steps: steps that were dealt to find out.
        microbatches: of each rank in a step: smallest, mean, largest.
        tokens: of a micro-batch, on average, without padding.
        padding: share of padding in all places of the rows.
        empty: share of micro-batches without a sample.
    """

    deal: str
    ranks: int
    steps: int
    microbatches: tuple[int, float, int]
    tokens: float
    padding: float
    empty: float


@dataclass(frozen=True)
class Phase:
    """The steps between two changes of the plan.

    Attributes:
        first: first step, from 0.
        end: the step after the last.
        compose: what a step holds.
        global_samples: samples per step.
        drawn: one entry per source that is drawn from, by combination.
        tokens: per step.
        encoders: share of the encoders in all costs; None where no costs are known.
        layout: None where the run would be refused.
    """

    first: int
    end: int
    compose: str
    global_samples: int
    drawn: list[Drawn]
    tokens: float
    encoders: float | None
    layout: Layout | None


@dataclass(frozen=True)
class Outlook:
    """What a recipe makes of a data set.

    Attributes:
        phases: what is drawn, from change to change.
        refusals: why a run of the recipe would be refused, a sentence each.
        unused: steps of declared changes that come after the last step.
    """

    phases: list[Phase]
    refusals: list[str]
    unused: list[int]

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


def mixtures(data: DataConfig, have: Sequence[str]) -> dict[int, Mixture]:
    """First step -> mixture: the recipe's own, and one for every declared change.

    Args:
        have: names of the training datasets of the data set.
    """
    found = {0: _mixture(data)}
    for change in data.changes:
        given = {key: value for key, value in vars(change).items() if value is not None}
        data = replace(data, **{key: value for key, value in given.items() if key != "step"})
        found[change.step] = _mixture(data)
    if data.missing != "skip":
        return found
    return {
        step: replace(mixture, datasets={n: w for n, w in mixture.datasets.items() if n in have})
        for step, mixture in found.items()
    }


def _mixture(data: DataConfig) -> Mixture:
    return Mixture(
        datasets=dict(data.datasets),
        global_samples=data.global_samples,
        temperature=data.temperature,
        combinations=dict(data.combinations),
        compose=data.compose,
        seed=data.seed,
        shuffle=Shuffle(data.shuffle.block, data.shuffle.window),
    )


def look_ahead(
    recipe: Recipe, catalogue: Catalogue, planned: Mapping[int, Mixture], costs: CostModel
) -> Outlook:
    """What the recipe's steps hold, and how they are dealt to its ranks.

    Args:
        planned: what ``mixtures`` gave.
        costs: what dealing goes by.

    Raises:
        DataError: the mixture draws from nothing.
    """
    timeline = Timeline(catalogue.sources, planned)
    refusals = list(_refusals(recipe, catalogue, planned))
    dealer = Dealer(catalogue, timeline, costs, _ranks(recipe), recipe.data.deal)
    steps = recipe.trainer.steps
    begins = [begin for begin in sorted(planned) if begin < steps]
    phases = []
    for begin, end in zip(begins, [*begins[1:], steps], strict=True):
        layout = None if refusals else _layout(dealer, begin, end, recipe.data.pad_to)
        phases.append(_phase(catalogue, timeline.at(begin), end, costs, layout))
    return Outlook(phases, refusals, [begin for begin in sorted(planned) if begin >= steps])


def _ranks(recipe: Recipe) -> Ranks:
    parallel = recipe.parallel
    count = parallel.processes // (parallel.tensor * parallel.pipeline * parallel.context)
    lockstep = max(1, parallel.expert * parallel.expert_tensor // parallel.tensor)
    return Ranks(count, lockstep, recipe.data.tokens_per_microbatch)


def _refusals(
    recipe: Recipe, catalogue: Catalogue, planned: Mapping[int, Mixture]
) -> Iterator[str]:
    longest = int(catalogue.tokens.max())
    for key, most in (
        ("data.tokens_per_microbatch", recipe.data.tokens_per_microbatch),
        ("model.language.max_tokens", recipe.model.language.max_tokens),
    ):
        if longest > most:
            yield f"the longest sample has {longest} tokens, more than {key}={most}"
    mixed = dict.fromkeys(s.dataset for s in catalogue.sources if s.combination == MIXED)
    uniform = any(mixture.compose == "uniform" for mixture in planned.values())
    if mixed and (recipe.data.deal == "sharded" or uniform):
        yield (
            f"{', '.join(mixed)} has shards with several combinations, which only "
            "data.compose=mixed with data.deal=balanced can draw"
        )


def _phase(
    catalogue: Catalogue, plan: GlobalPlan, end: int, costs: CostModel, layout: Layout | None
) -> Phase:
    samples = plan.mixture.global_samples
    epochs = plan.epochs(end)
    found, language, encoder = [], [], []
    for number, (source, share) in enumerate(zip(plan.sources, plan.weights, strict=True)):
        if not share:
            continue
        rows = slice(int(catalogue.starts[number]), int(catalogue.starts[number + 1]))
        tokens = catalogue.tokens[rows].astype(np.float64)
        work = samples * share * catalogue.work[rows].mean(0, dtype=np.float64)
        each = costs.linear * tokens.mean() + costs.quadratic * (tokens @ tokens) / len(tokens)
        language.append(samples * share * each)
        prices = np.array([costs.encoder.get(modality, 0.0) for modality in MODALITIES])
        encoder.append(float(prices @ work))
        found.append(
            Drawn(
                dataset=source.dataset,
                combination=source.combination,
                count=source.count,
                share=share,
                samples=samples * share,
                tokens_each=float(tokens.mean()),
                longest=int(tokens.max()),
                tokens=samples * share * float(tokens.mean()),
                token_share=0.0,
                epochs=epochs[source.name],
                work={m: float(w) for m, w in zip(MODALITIES, work, strict=True) if w},
                encoder_share=None,
            )
        )
    tokens_per_step, encoders = sum(each.tokens for each in found), sum(encoder)
    drawn = [
        replace(
            each,
            token_share=each.tokens / tokens_per_step,
            encoder_share=cost / encoders if encoders else None,
        )
        for each, cost in zip(found, encoder, strict=True)
    ]
    return Phase(
        first=plan.first_step,
        end=end,
        compose=plan.mixture.compose,
        global_samples=samples,
        drawn=sorted(drawn, key=lambda each: few_modalities_first(each.combination)),
        tokens=tokens_per_step,
        encoders=encoders / (encoders + sum(language)) if encoders else None,
        layout=layout,
    )


def _layout(dealer: Dealer, begin: int, end: int, pad_to: int) -> Layout:
    """Deal some of the steps from ``begin`` to ``end``."""
    ranks = dealer.ranks.count
    samples = dealer.timeline.at(begin).mixture.global_samples
    steps = _spread(begin, end, min(_STEPS, max(1, _DEALT // samples)))
    numbers, tokens, places, empty = [], 0, 0, 0
    for step in steps:
        rows, dealt = dealer.step(int(step))
        bins = dealt.rank * dealt.microbatches + dealt.micro
        length = dealer.catalogue.tokens[rows]
        filled = np.bincount(bins, length, ranks * dealt.microbatches).astype(np.int64)
        numbers.append(dealt.microbatches)
        tokens += int(filled.sum())
        places += int(np.maximum(1, -(-filled // pad_to)).sum()) * pad_to
        empty += int((filled == 0).sum())
    microbatches = ranks * sum(numbers)
    return Layout(
        deal=dealer.deal,
        ranks=ranks,
        steps=len(steps),
        microbatches=(min(numbers), sum(numbers) / len(numbers), max(numbers)),
        tokens=tokens / microbatches,
        padding=1 - tokens / places,
        empty=empty / microbatches,
    )


def _spread(begin: int, end: int, most: int) -> np.ndarray:
    """Steps at random, one in each of ``most`` stretches, so that no regular order is hit upon."""
    count = min(most, end - begin)
    cuts = begin + np.arange(count + 1, dtype=np.int64) * (end - begin) // count
    return np.random.Generator(np.random.PCG64(0)).integers(cuts[:-1], cuts[1:])
