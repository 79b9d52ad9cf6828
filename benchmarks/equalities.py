"""The table of equalities: every layout against one process, loss and gradient norm.

``python -m benchmarks.equalities [overrides]`` trains a tiny world (four blocks), runs every stage
in one process and in every tested layout, and writes ``docs/results/equalities.md``; a few minutes
on two cores. Overrides, such as ``trainer.clip=0``, are given to all runs of more than one process.
Ends with 1 if anything is not equal.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.side_by_side import heading
from tests.distributed import run_distributed
from unimoe_mcore.config.parallel import TESTED
from unimoe_mcore.evaluation.choices import Flip, flips

TARGET = Path(__file__).resolve().parents[1] / "docs" / "results" / "equalities.md"

FIRST_STEP = 1e-5
"""Largest relative difference of the first step."""

LATER_STEPS = 10.0
"""Largest relative difference of later steps, in spreads of the one-process run."""

NEAR_TIE = 1e-4
"""Largest margin, in logits, at which a token may go to another expert than in one process."""

SEEDS = 6
"""Shuffled summation orders that the spread is measured with."""

TENSOR = ("parallel.tensor=2", "parallel.sequence_parallel=true")
PIPELINE = ("parallel.pipeline=2",)
TEXT = (
    "stage.expert_datasets.text={twins: 1.0}",
    "data.datasets=${stage.expert_datasets.text}",
)
NO_ROUTING = "trainer.evaluation.routing=false"


@dataclass(frozen=True)
class Layout:
    """A layout of the table.

    Attributes:
        processes: how many.
        data_ranks: how many of them differ in their data.
        overrides: of the recipe.
    """

    processes: int
    data_ranks: int
    overrides: tuple[str, ...]


DENSE = {
    "DP2": Layout(2, 2, ()),
    "TP2+SP": Layout(2, 1, TENSOR),
    "PP2": Layout(2, 1, PIPELINE),
    "PP2, two virtual stages": Layout(2, 1, (*PIPELINE, "parallel.virtual_pipeline=2")),
}
SPARSE = {
    "EP2": Layout(2, 2, ("parallel.expert=2",)),
    "EP4": Layout(4, 4, ("parallel.expert=4",)),
    "PP2xEP2": Layout(4, 2, (*PIPELINE, "parallel.expert=2")),
    "TP2xEP2": Layout(4, 2, (*TENSOR, "parallel.expert=2")),
    "EP2xETP2": Layout(4, 4, ("parallel.expert=2", "parallel.expert_tensor=2")),
    "DP2xEP2": Layout(4, 4, ("parallel.expert=2",)),
    "TP2xPP2": Layout(4, 1, (*TENSOR, *PIPELINE)),
    "TP2xPP2xEP2": Layout(4, 1, (*TENSOR, *PIPELINE, "parallel.expert=2")),
    "PP2xEP2, two virtual stages": Layout(
        4, 2, (*PIPELINE, "parallel.expert=2", "parallel.virtual_pipeline=2")
    ),
}

STAGES: dict[str, tuple[str, tuple[str, ...]]] = {
    "base": ("base", ()),
    "base, untied": ("base", ("model.language.tied=false",)),
    "stage 1": ("stage1", ()),
    "stage 2": ("stage2", ("stage.expert=speech",)),
    "stage 3": ("stage3", ()),
    "stage 1, text only": ("stage1", ("stage.train=[connector.speech]", *TEXT)),
    "stage 3, text only": ("stage3", TEXT),
}
"""Name -> recipe and overrides. The text-only ones have no medium on any rank; the untied one has
an output layer with weights of its own."""

ONE_MICROBATCH = "data.tokens_per_microbatch=4096"
FOUR_MICROBATCHES = {1: 80, 2: 40, 4: 30}
"""Data-parallel ranks -> tokens of a micro-batch that make four of the global batch."""

VARIANTS: dict[str, tuple[tuple[str, ...], str]] = {
    "balanced": ((), "dealt"),
    "sharded": (("data.deal=sharded",), "dealt"),
    "skewed": ((), "skewed"),
    "unpacked": ((), "rows"),
    "accumulated": ((), "dealt"),
    "distributed optimizer": (("parallel.distributed_optimizer=true",), "dealt"),
}
"""Name -> overrides and cut (``tests/training/cases_equalities.py``)."""

EVERYWHERE = (
    "model.language.blocks=4",
    "data.global_samples=16",
    "trainer.steps=8",
    "parallel.allow_untested=true",  # what is tested is found out here
    NO_ROUTING,
)


def main(overrides: Sequence[str]) -> int:
    """Build, run, compare, write."""
    began = time.perf_counter()
    with TemporaryDirectory(prefix="equalities-") as name:
        run_distributed("tests.training.cases_equalities:build_world", 2, timeout=1200, folder=name)
        references = _run(name, 1, _reference_cases())
        spreads = {stage: _spread(stage, references) for stage in STAGES}
        rows = []
        for processes in (2, 4):
            cases, labels = _layout_cases(processes, overrides)
            for label, found in _run(name, processes, cases).items():
                stage, layout, variant = labels[label]
                reference = references[f"{stage}, one process"]
                rows.append(Row(stage, layout, variant, found, reference, spreads[stage]))
    _write(rows, spreads, overrides, time.perf_counter() - began)
    return 1 if any(row.failed for row in rows) else 0


def _reference_cases() -> dict[str, dict[str, Any]]:
    cases = {}
    for stage in STAGES:
        cases[f"{stage}, one process"] = _case(stage, (), ())
        for seed in range(1, SEEDS + 1):
            cases[f"{stage}, shuffled {seed}"] = _case(stage, (), (), "shuffled", seed)
    return cases


def _layout_cases(
    processes: int, overrides: Sequence[str]
) -> tuple[dict[str, dict[str, Any]], dict[str, tuple[str, str, str]]]:
    cases, labels = {}, {}
    for stage in STAGES:
        layouts = {**DENSE, **SPARSE} if stage == "stage 3" else DENSE
        for name, layout in layouts.items():
            if layout.processes != processes:
                continue
            for variant in _variants(stage, layout):
                label = f"{stage}, {name}, {variant}"
                more, cut = VARIANTS[variant]
                if variant == "accumulated":
                    tokens = FOUR_MICROBATCHES[layout.data_ranks]
                    more = (f"data.tokens_per_microbatch={tokens}",)
                cases[label] = _case(stage, layout.overrides, (*more, *overrides), cut)
                labels[label] = (stage, name, variant)
    return cases, labels


def _variants(stage: str, layout: Layout) -> list[str]:
    """Those that differ: one data-parallel rank has nothing to be dealt."""
    chosen = ["balanced"]
    if stage.endswith("text only"):
        return chosen
    if stage.endswith("untied"):
        return [*chosen, "distributed optimizer"]
    if layout.data_ranks > 1 and stage != "base":
        chosen += ["sharded", "skewed"]
    return [*chosen, "unpacked", "accumulated", "distributed optimizer"]


def _case(
    stage: str, layout: Sequence[str], more: Sequence[str], cut: str = "dealt", seed: int = 0
) -> dict[str, Any]:
    recipe, own = STAGES[stage]
    whole = () if any("expert=" in each for each in layout) else ("parallel.expert=1",)
    extra = [*EVERYWHERE, ONE_MICROBATCH, *own, *whole, *layout, *more]
    return {"recipe": recipe, "extra": extra, "cut": cut, "seed": seed}


def _run(folder: str, processes: int, cases: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What every case found, the choices of all ranks together.

    Raises:
        RuntimeError: if ranks report other losses or norms.
    """
    ranks = run_distributed(
        "tests.training.cases_equalities:run_cases",
        processes,
        timeout=3600,
        folder=folder,
        cases=cases,
    )
    print(f"{len(cases)} runs of {processes} processes are done", flush=True)
    found = {}
    for label in cases:
        runs = [rank[label] for rank in ranks]
        for key in ("losses", "norms"):
            if any(run[key] != runs[0][key] for run in runs):
                raise RuntimeError(f"{label}: the ranks report other {key}")
        together = [
            {token: choice for choices in step for token, choice in choices.items()}
            for step in zip(*(run["choices"] for run in runs), strict=True)
        ]
        found[label] = {**runs[0], "choices": together}
    return found


def difference(value: float, wanted: float) -> float:
    """Relative; 0 where both are exactly 0 (no gradient reaches what trains)."""
    return 0.0 if value == wanted else abs(value - wanted) / max(abs(wanted), 1e-30)


@dataclass(frozen=True)
class Spread:
    """How far runs of one process lie from one another that only add in another order.

    Attributes:
        loss: the largest relative difference of any later step.
        norm: the same of the gradient norm.
        runs: how many were compared.
        flipped: how many more were left out because a token changed its expert.
    """

    loss: float
    norm: float
    runs: int
    flipped: int


SMALLEST_SPREAD = 2.0**-24
"""Half of the distance between 1 and the next fp32 number: no spread counts as smaller."""


def _spread(stage: str, references: dict[str, Any]) -> Spread:
    reference = references[f"{stage}, one process"]
    shuffled = [references[f"{stage}, shuffled {seed}"] for seed in range(1, SEEDS + 1)]
    kept = [run for run in shuffled if not flips_of(run, reference)]
    loss, norm = (
        max(
            (
                difference(value, wanted)
                for run in kept
                for value, wanted in zip(run[key][1:], reference[key][1:], strict=True)
            ),
            default=0.0,
        )
        for key in ("losses", "norms")
    )
    return Spread(loss, norm, len(kept), len(shuffled) - len(kept))


def flips_of(run: dict[str, Any], reference: dict[str, Any]) -> list[Flip]:
    """Tokens that went to other experts than in the reference, of all steps."""
    pairs = zip(run["choices"], reference["choices"], strict=True)
    return sorted((f for a, b in pairs for f in flips(a, b)), key=lambda flip: -flip.margin)


class Row:
    """One run against one process."""

    def __init__(
        self,
        stage: str,
        layout: str,
        variant: str,
        found: dict[str, Any],
        reference: dict[str, Any],
        spread: Spread,
    ) -> None:
        self.stage, self.layout, self.variant = stage, layout, variant
        self.microbatches = found["microbatches"]
        self.flips = flips_of(found, reference)
        self.loss, *losses = map(difference, found["losses"], reference["losses"])
        self.norm, *norms = map(difference, found["norms"], reference["norms"])
        self.later_loss = max(losses) / max(spread.loss, SMALLEST_SPREAD)
        self.later_norm = max(norms) / max(spread.norm, SMALLEST_SPREAD)

    @property
    def verdict(self) -> str:
        """In a word."""
        if self.flips and self.flips[0].margin > NEAR_TIE:
            return "NOT EQUAL: a token far from a tie chose another expert"
        if self.flips:
            return f"equal but for a near-tie: {self.flips[0].token}"
        if max(self.loss, self.norm) > FIRST_STEP:
            return "NOT EQUAL in the first step"
        if max(self.later_loss, self.later_norm) > LATER_STEPS:
            return "NOT EQUAL in later steps"
        return "equal"

    @property
    def failed(self) -> bool:
        """Whether it is not equal, and no near-tie is the reason."""
        return self.verdict.startswith("NOT")

    def line(self) -> str:
        """As a line of the table."""
        margin = f"{len(self.flips)} ({self.flips[0].margin:.0e})" if self.flips else "0"
        cells = (
            self.stage, self.layout, self.variant, str(self.microbatches), f"{self.loss:.0e}",
            f"{self.norm:.0e}", f"{self.later_loss:.1f}", f"{self.later_norm:.1f}", margin,
            self.verdict,
        )  # fmt: skip
        return f"| {' | '.join(cells)} |"


NOTES = f"""
fp32; one global batch of 16 samples a step, five steps; the tiny world of `tests/workspace.py` with
four blocks, two of them with four experts. One process takes a step's samples in one micro-batch.
Stage 3 has LoRA on attention, dense MLPs and experts.

- **loss, norm**: relative difference of the first step's loss and gradient norm; at most
  {FIRST_STEP:.0e}.
- **later**: the largest relative difference of the later steps, divided by the spread of the
  one-process run: {SEEDS} runs of the same global batches whose samples are put into other
  micro-batches in another order; a spread below {SMALLEST_SPREAD:.0e} (half a unit in the last
  place of fp32) counts as that. At most {LATER_STEPS:.0f}.
- **flips**: tokens (of any step and layer) that went to other experts than in one process, and the
  largest margin among them: logit of the last expert chosen less that of the first not chosen. A
  flip at a margin above {NEAR_TIE:.0e} is a failure; one below is named, and its run's losses count
  as explained by it.
- **balanced, sharded**: `data.deal`. **skewed**: pictures on the first rank only, sounds on the
  last only. **unpacked**: every sample a micro-batch of its own (so positions restart and attention
  stays inside samples where they are packed). **accumulated**: `data.tokens_per_microbatch` small
  enough for about four micro-batches. **text only**: no medium on any rank; in stage 1 only the
  speech connector trains then, whose gradient is exactly zero.
- Two virtual stages need an even number of micro-batches.
"""


def _write(
    rows: list[Row], spreads: dict[str, Spread], overrides: Sequence[str], seconds: float
) -> None:
    failed = [row for row in rows if row.failed]
    plain = [row for row in rows if not row.flips]
    columns = (
        "stage", "layout", "variant", "micro-batches", "loss", "norm", "later: loss, spreads",
        "later: norm, spreads", "flips (margin)", "verdict",
    )  # fmt: skip
    text = [
        "# The same numbers in every layout",
        "",
        heading("equalities"),
        f"{seconds:.0f} s. Overrides of all layouts: {' '.join(overrides) or 'none'}.",
        "",
        f"**{len(rows)} runs, {len(rows) - len(failed)} equal to one process**, of these "
        f"{sum(not row.failed for row in rows if row.flips)} with a token that changed its expert "
        f"on a near-tie. Largest first-step difference: loss {max(row.loss for row in plain):.1e}, "
        f"gradient norm {max(row.norm for row in plain):.1e}; later steps: "
        f"{max(row.later_loss for row in plain):.1f} and "
        f"{max(row.later_norm for row in plain):.1f} spreads. Kinds of layouts tested: "
        + "; ".join(" x ".join(kind) or "data parallelism alone" for kind in TESTED)
        + ".",
        NOTES,
        "| stage | spread of the loss | of the norm | runs | left out for a flip |",
        "| --- | --- | --- | --- | --- |",
        *(
            f"| {stage} | {s.loss:.1e} | {s.norm:.1e} | {s.runs} | {s.flipped} |"
            for stage, s in spreads.items()
        ),
        "",
        "| " + " | ".join(columns) + " |",
        "| --- " * len(columns) + "|",
        *(row.line() for row in rows),
        "",
    ]
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    TARGET.write_text("\n".join(text), encoding="utf8")
    print("\n".join([*text[:7], *(row.line() for row in failed)]))
    print(f"written to {TARGET}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
