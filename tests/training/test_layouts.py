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
GUARDS = "tests.training.cases_guards"
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
EXPERT_TENSOR = ["parallel.expert=2", "parallel.expert_tensor=2"]
INTERLEAVED = [
    "parallel.pipeline=2",
    "parallel.virtual_pipeline=2",
    "parallel.expert=1",
    NO_ROUTING,
]
FOUR_BLOCKS = ["model.language.blocks=4"]
# Two pieces a stage need four blocks, which only the base can have here: all experts are its own.
OWN = [
    "stage.base=${paths.runs}/four-blocks/gives",
    "stage.experts=[base, base, base, base]",
    "stage.start=${paths.runs}/four-blocks-1/gives",
    *FOUR_BLOCKS,
]
TEXT = [
    "stage.expert_datasets.text={twins: 1.0}",
    "data.datasets=${stage.expert_datasets.text}",
]
ONE_CONNECTOR = ["stage.train=[connector.speech]"]
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
        "four-blocks": case("stage3", [*EP1, *OWN]),
        "text": case("stage1", [*ONE_CONNECTOR, *TEXT]),
        "one-connector": case("stage1", ONE_CONNECTOR),
    }
    return run_distributed(
        f"{GUARDS}:references", 1, timeout=240, folder=str(world.folder), cases=cases
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
        "four-blocks PP=2 VPP=2": case("stage3", [*OWN, *INTERLEAVED]),
        "four-blocks PP=2 VPP=2 workers": case("stage3", [*OWN, *INTERLEAVED, WORKERS]),
        "stage3 TP=2 EP=2": case("stage3", [*TENSOR, "parallel.expert=2"]),
        "text DP=2": case("stage1", [*ONE_CONNECTOR, *TEXT]),
        "text PP=2": case("stage1", [*ONE_CONNECTOR, *TEXT, *PIPELINE]),
        "one-connector DP=2 skewed": case("stage1", ONE_CONNECTOR, "skewed"),
    }
    ranks = run_distributed(
        f"{GUARDS}:layouts_and_guards", 2, timeout=280, folder=str(world.folder), cases=cases
    )
    assert ranks[0] == ranks[1]
    return ranks[0]


@pytest.fixture(scope="module")
def four(world: World) -> dict[str, Any]:
    """Four processes; two steps each."""
    cases = {
        "stage3 EP=4": case("stage3", ["parallel.expert=4"]),
        "stage3 DP=2 x EP=2": case("stage3", EP2),
        "stage3 PP=2 x EP=2": case("stage3", [*PIPELINE, *EP2]),
        "stage3 TP=2 x EP=2": case("stage3", [*TENSOR, *EP2]),
        "stage3 EP=2 x ETP=2": case("stage3", EXPERT_TENSOR),
        "stage3 EP=2 x ETP=2 sharded": case("stage3", [*EXPERT_TENSOR, SHARDED]),
    }
    for each in cases.values():
        each["steps"] = 2
    ranks = run_distributed(
        f"{CASES}:layouts", 4, timeout=280, folder=str(world.folder), cases=cases
    )
    assert all(rank == ranks[0] for rank in ranks)
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
        "four-blocks PP=2 VPP=2",
        "four-blocks PP=2 VPP=2 workers",
        "stage3 TP=2 EP=2",
        "one-connector DP=2 skewed",
    ],
)
def test_a_layout_agrees_with_one_process(
    layout: str, one: dict[str, Any], two: dict[str, Any]
) -> None:
    agrees(two[layout], one[layout.split()[0]], steps=3)


@pytest.mark.parametrize(
    "layout",
    [
        "stage3 EP=4",
        "stage3 DP=2 x EP=2",
        "stage3 PP=2 x EP=2",
        "stage3 TP=2 x EP=2",
        "stage3 EP=2 x ETP=2",
        "stage3 EP=2 x ETP=2 sharded",
    ],
)
def test_a_layout_of_four_processes_agrees_with_one(
    layout: str, one: dict[str, Any], four: dict[str, Any]
) -> None:
    agrees(four[layout], one[layout.split()[0]], steps=2)


def agrees(found: list[list[float]], reference: list[list[float]], steps: int) -> None:
    assert len(found) == steps
    for (loss, norm), (wanted_loss, wanted_norm) in zip(found, reference[:steps], strict=True):
        assert loss == pytest.approx(wanted_loss, rel=TOLERANCE)
        assert norm == pytest.approx(wanted_norm, rel=TOLERANCE)
        assert norm > 0


@pytest.mark.parametrize("layout", ["text DP=2", "text PP=2"])
def test_a_connector_that_no_rank_has_a_medium_for_gets_no_gradient(
    layout: str, one: dict[str, Any], two: dict[str, Any]
) -> None:
    assert [norm for _, norm in two[layout]] == [0.0] * 3
    assert [norm for _, norm in one["text"]] == [0.0] * 3
    losses = [loss for loss, _ in one["text"]]
    assert [loss for loss, _ in two[layout]] == pytest.approx(losses, rel=TOLERANCE)


def test_padding_reaches_the_routers_in_the_parts_that_their_tokens_are_in(
    two: dict[str, Any],
) -> None:
    """HybridModel passes the mask on whole; one router in two blocks sees every token once."""
    seen = two["guards"]["tensor"]
    assert seen["masks fit"]
    assert seen["padding seen"] == seen["padding"] > 0


def test_one_tensor_rank_alone_writes_a_connector(two: dict[str, Any]) -> None:
    assert two["guards"]["tensor"]["writers of a connector"] == [1]


def test_adapters_of_experts_stay_alike_where_experts_are_replicated(two: dict[str, Any]) -> None:
    """Experts that are whole under TP=2 are reduced in the experts' group, as their weights are."""
    assert two["guards"]["tensor"]["adapters alike"]


def test_adapters_of_gated_layers_can_be_read_without_tensor_parallelism(
    two: dict[str, Any],
) -> None:
    halves = two["guards"]["adapters"]
    for found, wanted in zip(halves["loaded"], halves["went on"], strict=True):
        assert found == pytest.approx(wanted, rel=TOLERANCE)


def test_a_model_that_lacks_layers_is_refused(two: dict[str, Any]) -> None:
    """Megatron builds the first segment only where a pattern has a boundary too many."""
    assert "make 2, but the model has 4" in two["guards"]["boundaries"]


def test_pieces_of_a_stage_answer_for_themselves(two: dict[str, Any]) -> None:
    first, last = two["guards"]["interleaved"]["chunks"]
    kind = "encoder_or_decoder"
    assert first == [[True, False, 0, kind], [False, False, 1, kind]]
    assert last == [[False, False, 0, kind], [False, True, 1, kind]]
    assert two["guards"]["interleaved"]["tied"] == [[300], [300]]


def test_questions_are_judged_alike_by_interleaved_stages(
    one: dict[str, Any], two: dict[str, Any]
) -> None:
    asked = two["guards"]["interleaved"]["asked"]
    assert len(asked) == 9
    assert asked == pytest.approx(one["asked"], rel=TOLERANCE)


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


def test_an_untested_layout_is_logged_with_what_was_tested(two: dict[str, Any]) -> None:
    (event,) = two["guards"]["untested"]
    assert event["layout"] == "tensor x expert_tensor"
    assert "pipeline x virtual_pipeline" in event["tested"]


def test_past_layouts_leave_no_groups_and_hardly_a_thread(two: dict[str, Any]) -> None:
    """A gloo group has three threads, a layout over ten groups; a cache of Megatron's keeps one."""
    left = two["guards"]["left"]
    assert left["groups"] == 1
    assert left["threads"] <= 36  # of about ten runs


def test_no_rank_takes_a_step_with_a_bad_gradient(two: dict[str, Any]) -> None:
    for said, stayed in two["guards"]["bad gradient"]:
        assert said == "the gradient norm is nan; the step is not taken"
        assert stayed
