"""How evenly the ranks work: our two dealings beside two samplers, from 8 to 4096 ranks."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from benchmarks.side_by_side import RESULTS, write
from benchmarks.synthetic import UNIMOE_7B, write_catalogue
from data_pipeline.planning.catalogue import Catalogue
from data_pipeline.planning.dealing import Dealt, Ranks, StepWork, deal_balanced
from data_pipeline.planning.plan import GlobalPlan, Mixture
from data_pipeline.planning.sharding import ROAMING, deal_sharded, owners
from data_pipeline.planning.work import demands, step_work

SAMPLES = 200_000
WORLDS = (8, 64, 512, 4096)
EACH = 8
CAPACITY = 4096
EXPERTS = 8
STEPS = {8: 200, 64: 100, 512: 40, 4096: 12}


@dataclass
class Measured:
    """Waiting in one step: time over what a perfect division would take, and the roaming share."""

    micro: float
    typical: float
    ahead: float
    step: float
    roaming: float = 0.0


def measure(work: StepWork, dealt: Dealt, ranks: int) -> Measured:
    """Compare with the mean work of a rank.

    ``micro``: sum over micro-batches of the slowest rank of an EP group, of the slowest group;
    ``typical``: the same of the mean group; ``ahead``: the slowest group again, where the
    encoders of a whole step run before its first micro-batch; ``step``: most over mean per rank.
    """
    shape = (ranks // EXPERTS, EXPERTS, dealt.microbatches)
    place = dealt.rank * dealt.microbatches + dealt.micro

    def table(values: np.ndarray) -> np.ndarray:
        return np.bincount(place, values, ranks * dealt.microbatches).reshape(shape)

    whole, language, encoder = table(work.total), table(work.language), table(work.encoder)
    mean = whole.sum() / ranks
    waited = whole.max(1).sum(1)
    ahead = language.max(1).sum(1) + encoder.sum(2).max(1)
    return Measured(
        waited.max() / mean, waited.mean() / mean, ahead.max() / mean, whole.sum(2).max() / mean
    )


def random_sampler(catalogue: Catalogue, ranks: int) -> Iterator[tuple[StepWork, Dealt]]:
    """Samples in random order, eight to each rank, packed in that order."""
    rng = np.random.Generator(np.random.PCG64(1))
    while True:
        rows = rng.permutation(len(catalogue))[: EACH * ranks]
        work = step_work(catalogue, rows, UNIMOE_7B)
        tokens = work.tokens.reshape(ranks, EACH)
        micro, filled = np.zeros_like(tokens), np.zeros(ranks, dtype=np.int64)
        current = np.zeros(ranks, dtype=np.int64)
        for column in range(EACH):
            full = filled + tokens[:, column] > CAPACITY
            current += full
            filled = np.where(full, 0, filled) + tokens[:, column]
            micro[:, column] = current
        rank = np.repeat(np.arange(ranks), EACH)
        yield work, Dealt(rank, micro.ravel(), int(micro.max()) + 1)


def official_sampler(catalogue: Catalogue, ranks: int) -> Iterator[tuple[StepWork, Dealt]]:
    """Uni-MoE's modality-grouped sampler (8 experts), two samples a micro-batch, four of those.

    Each combination is sorted by its text length (media are not in it), cut into mega-batches of
    one step, the last of each thrown away, mega-batches shuffled; consecutive micro-batches go to
    the ranks in turn. Padding inside a micro-batch is not charged.
    """
    rng = np.random.Generator(np.random.PCG64(2))
    step, steps = EACH * ranks, []
    for number, source in enumerate(catalogue.sources):
        rows = np.arange(catalogue.starts[number], catalogue.starts[number + 1])
        media = catalogue.work[rows] @ np.array([576, 72, 50 / 30, 0])
        text = catalogue.tokens[rows] - media
        ordered = rows[np.argsort(-text, kind="stable")]
        whole = source.count // step * step
        steps += list(ordered[:whole].reshape(-1, step))
    batch = np.arange(step) // 2
    while True:
        for number in rng.permutation(len(steps)):
            work = step_work(catalogue, steps[number], UNIMOE_7B)
            yield work, Dealt(batch % ranks, batch // ranks, EACH // 2)


def planned(
    catalogue: Catalogue, ranks: int, deal: Callable[[StepWork], Dealt]
) -> Iterator[tuple[StepWork, Dealt]]:
    """Steps of our plan, dealt."""
    mixture = Mixture({s.dataset: 1.0 for s in catalogue.sources}, EACH * ranks)
    plan, step = GlobalPlan(catalogue.sources, mixture), 0
    while True:
        work = step_work(catalogue, catalogue.rows(plan.step(step)), UNIMOE_7B)
        yield work, deal(work)
        step += 1


def ways(catalogue: Catalogue, ranks: int) -> dict[str, tuple[Iterator, np.ndarray]]:
    """Every way to make steps, and who owns what in it."""
    sizes = Ranks(ranks, EXPERTS, CAPACITY)
    mixture = Mixture({s.dataset: 1.0 for s in catalogue.sources}, EACH * ranks)
    plan = GlobalPlan(catalogue.sources, mixture)
    owner = owners(demands(catalogue, plan, UNIMOE_7B), ranks, EXPERTS)
    nobody = np.zeros(ranks, dtype=np.int64)
    return {
        "balanced": (planned(catalogue, ranks, lambda w: deal_balanced(w, sizes)), nobody),
        "sharded": (planned(catalogue, ranks, lambda w: deal_sharded(w, sizes, owner)), owner),
        "random": (random_sampler(catalogue, ranks), nobody),
        "official": (official_sampler(catalogue, ranks), nobody),
    }


def main() -> None:
    rows, drawn = [], dict[str, list[float]]()
    with tempfile.TemporaryDirectory() as folder:
        catalogue = write_catalogue(Path(folder) / "catalogue", SAMPLES)
        for ranks in WORLDS:
            for name, (steps, owner) in ways(catalogue, ranks).items():
                found = []
                for _, (work, dealt) in zip(range(STEPS[ranks]), steps, strict=False):
                    each = measure(work, dealt, ranks)
                    each.roaming = float((owner[dealt.rank] == ROAMING).mean())
                    found.append(each)
                mean = {k: float(np.mean([getattr(m, k) for m in found])) for k in vars(found[0])}
                worst = max(m.micro for m in found)
                roams = f"{100 * mean['roaming']:.1f} %" if name == "sharded" else ""
                numbers = (mean["micro"], worst, mean["typical"], mean["ahead"], mean["step"])
                cells = " | ".join(f"{n:.3f}" for n in numbers)
                rows.append(f"| {ranks} | {name} | {cells} | {roams} | {len(found)} |")
                drawn.setdefault(name, []).append(mean["micro"])
                print(rows[-1], flush=True)
    draw(drawn)
    write(
        "balance",
        "Waiting of ranks for each other, in multiples of a perfect division",
        rows,
        ("ranks", "dealing", "micro-batches", "worst step", "mean group", "encoders first",
         "per step", "read by roaming ranks", "steps"),
        (
            f"{SAMPLES:,} samples, 40/25/20/10/5 % text, image, speech, video, image and speech; "
            f"{EACH} samples per rank and step, micro-batches of {CAPACITY} tokens, EP groups of "
            f"{EXPERTS}; costs: {UNIMOE_7B.source}.",
            "*micro-batches*: sum over the micro-batches of a step of the slowest rank in an EP "
            "group, of the slowest group, over the mean work of a rank, mean over steps; *worst "
            "step*: its maximum; *mean group*: the mean over groups instead of the slowest; "
            "*encoders first*: the same if all encoders of a step run before its language model; "
            "*per step*: most over mean work of a rank.",
            "*random*: a plain random sampler, eight samples to each rank, packed as they come. "
            "*official*: Uni-MoE's modality-grouped sampler (4 micro-batches of 2, no padding "
            "charged); it drops the last mega-batch of every combination.",
            "![balance](balance.png)",
        ),
    )  # fmt: skip


def draw(drawn: dict[str, list[float]]) -> None:
    figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    for name, values in drawn.items():
        axes.plot(WORLDS, [100 * (v - 1) for v in values], marker="o", label=name)
    axes.set(xscale="log", yscale="log", xlabel="ranks", ylabel="waiting beyond perfect, %")
    axes.set_xticks(WORLDS, [str(w) for w in WORLDS])
    axes.minorticks_off()
    axes.axhline(3, color="grey", lw=0.8, ls=":")
    axes.text(WORLDS[0], 3.1, "3 %", color="grey", va="bottom")
    axes.legend(frameon=False, ncols=2)
    RESULTS.mkdir(exist_ok=True)
    figure.savefig(RESULTS / "balance.png", dpi=120)


if __name__ == "__main__":
    main()
