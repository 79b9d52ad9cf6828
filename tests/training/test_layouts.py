"""One global batch, the same loss and gradient norm in every layout; stages; resumes.

Tolerance 1e-5 (relative, fp32): layouts add the same numbers in another order. Measured
differences are below 1e-6.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.conftest import World
from tests.distributed import run_distributed

CASES = "tests.training.cases_stages"
TOLERANCE = 1e-5

EP1, EP2 = ["parallel.expert=1"], ["parallel.expert=2"]
NO_ROUTING = "trainer.evaluation.routing=false"
PIPELINE = ["parallel.pipeline=2", "parallel.expert=1", NO_ROUTING]
TENSOR = [
    "parallel.tensor=2",
    "parallel.sequence_parallel=true",
    "parallel.expert=1",
    NO_ROUTING,
]
SPEECH = ["stage.expert=speech"]
UNIFORM, SHARDED = "data.compose=uniform", "data.deal=sharded"
WORKERS = "data.workers=1"


def case(recipe: str, extra: list[str], deal: str = "balanced") -> dict[str, Any]:
    return {"recipe": recipe, "extra": extra, "deal": deal}


@pytest.fixture(scope="module")
def one(world: World) -> dict[str, Any]:
    """The reference: one process."""
    cases = {
        "stage3": case("stage3", EP1),
        "stage2": case("stage2", SPEECH),
        "stage1": case("stage1", []),
        "base": case("base", []),
        "uniform": case("stage3", [*EP1, UNIFORM]),
    }
    return run_distributed(
        f"{CASES}:layouts", 1, timeout=240, folder=str(world.folder), cases=cases
    )[0]


@pytest.fixture(scope="module")
def two(world: World) -> dict[str, Any]:
    """Two processes in all layouts, one after the other in one launch."""
    cases = {
        "base DP=2": case("base", []),
        "base PP=2": case("base", PIPELINE),
        "base TP=2": case("base", TENSOR),
        "stage1 DP=2": case("stage1", []),
        "stage1 DP=2 skewed": case("stage1", [], "skewed"),
        "stage1 PP=2": case("stage1", PIPELINE),
        "stage2 DP=2": case("stage2", SPEECH),
        "stage2 DP=2 skewed": case("stage2", SPEECH, "skewed"),
        "stage2 TP=2": case("stage2", [*SPEECH, *TENSOR]),
        "stage3 DP=2 EP=1": case("stage3", EP1),
        "stage3 EP=2": case("stage3", EP2),
        "stage3 EP=2 skewed": case("stage3", EP2, "skewed"),
        "stage3 PP=2": case("stage3", PIPELINE),
        "stage3 TP=2": case("stage3", TENSOR),
        "stage3 EP=2 sharded": case("stage3", [*EP2, SHARDED, WORKERS]),
        "stage3 PP=2 workers": case("stage3", [*PIPELINE, WORKERS]),
        "uniform EP=2": case("stage3", [*EP2, UNIFORM]),
    }
    ranks = run_distributed(
        f"{CASES}:layouts", 2, timeout=280, folder=str(world.folder), cases=cases
    )
    assert ranks[0] == ranks[1]
    return ranks[0]


@pytest.mark.parametrize(
    "layout",
    [
        "base DP=2",
        "base PP=2",
        "base TP=2",
        "stage1 DP=2",
        "stage1 DP=2 skewed",
        "stage1 PP=2",
        "stage2 DP=2",
        "stage2 DP=2 skewed",
        "stage2 TP=2",
        "stage3 DP=2 EP=1",
        "stage3 EP=2",
        "stage3 EP=2 skewed",
        "stage3 PP=2",
        "stage3 TP=2",
        "stage3 EP=2 sharded",
        "stage3 PP=2 workers",
        "uniform EP=2",
    ],
)
def test_a_layout_agrees_with_one_process(
    layout: str, one: dict[str, Any], two: dict[str, Any]
) -> None:
    reference = one[layout.split()[0]]
    assert len(two[layout]) == len(reference) == 3
    for (loss, norm), (wanted_loss, wanted_norm) in zip(two[layout], reference, strict=True):
        assert loss == pytest.approx(wanted_loss, rel=TOLERANCE)
        assert norm == pytest.approx(wanted_norm, rel=TOLERANCE)
        assert norm > 0


def test_every_stage_trains(world: World) -> None:
    losses = world.losses
    assert set(losses) == {
        "base", "stage1", "stage2-image", "stage2-speech", "stage2-audio", "stage3", "long"
    }  # fmt: skip
    assert losses["base"][-1] < losses["base"][0]


def test_a_stopped_run_continues_bitwise(world: World) -> None:
    ranks = run_distributed(f"{CASES}:resumed", 2, timeout=240, folder=str(world.folder))
    assert len(ranks[0]["whole"]) == 4
    assert ranks[0]["parts"] == ranks[0]["whole"]
