"""What a step is said to cost, traces, recomputation, models built without memory; one launch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.conftest import World
from tests.distributed import run_distributed
from unimoe_mcore.config.recipe import Recipe
from unimoe_mcore.config.trainer import ProfileConfig
from unimoe_mcore.config.validate import validate
from unimoe_mcore.runtime import peak

ALL = "stage.train=[embeddings,norms,attention,mlp,router,experts,lora,connectors]"
COUNTING = {
    "base": ["base"],
    "stage3": ["stage3"],
    "nothing below": ["stage3", "stage.train=[lora]", "stage.lora.targets=[experts]"],
    "everything": ["stage3", ALL],
}
TENSOR = [
    "parallel.tensor=2",
    "parallel.sequence_parallel=true",
    "parallel.expert=1",
    "trainer.evaluation.routing=false",
]
PIPELINE = ["parallel.pipeline=2", "parallel.expert=1", "trainer.evaluation.routing=false"]
EMPTY = {"EP": ["stage3", []], "TP": ["stage3", TENSOR], "PP": ["stage3", PIPELINE]}
FROZEN = "stage.train=[router,lora]"
RECOMPUTING = {
    f"{name} {how}": ["stage3", *extra, f"trainer.recompute={how}"]
    for name, extra in {
        "EP": [],
        "TP": TENSOR,
        "frozen below": [FROZEN],
    }.items()
    for how in (("none", "selective", "full") if name == "EP" else ("none", "full"))
}


@pytest.fixture(scope="module")
def ranks(world: World) -> list[dict[str, Any]]:
    return run_distributed(
        "tests.training.cases_metrics:everything",
        2,
        timeout=240,
        folder=str(world.folder),
        counting=COUNTING,
        recomputing=RECOMPUTING,
        empty=EMPTY,
    )


@pytest.mark.parametrize("case", list(COUNTING))
def test_operations_are_those_that_pytorch_counts(case: str, ranks: list[dict[str, Any]]) -> None:
    counted = ranks[0]["counted"][case]
    assert counted["language"] + counted["towers"] == counted["counter"] > 0
    assert (counted["towers"] > 0) == (case != "base")


def test_a_line_of_the_metrics_says_what_the_step_cost(ranks: list[dict[str, Any]]) -> None:
    traced = ranks[0]["traced"]
    peak = 2 * traced["start"]["peak"]["operations"]
    assert len(traced["lines"]) == 4
    for line in traced["lines"]:
        rate = line["operations"] / line["seconds"]
        assert line["operations_per_second"] == pytest.approx(rate, rel=1e-3)
        assert line["mfu"] == pytest.approx(rate / peak, abs=1e-6)
        assert line["tokens_per_second"] == pytest.approx(
            line["tokens"] / line["seconds"], rel=1e-3
        )
        assert line["samples_per_second"] > 0
        assert 0 < line["communication_seconds"] + line["optimizer_seconds"] < line["seconds"]
        assert line["memory_bytes"] > 1e8
        assert 1 <= line["balance_busy"] <= 2
        # Nothing was broken: what was read is what was planned.
        assert 1 <= line["balance_read"] == line["balance_planned"] < 2


def test_a_run_says_what_it_will_hold(ranks: list[dict[str, Any]]) -> None:
    parameters, trained = ranks[0]["traced"]["held"]
    assert ranks[0]["traced"]["start"]["memory"] == {
        "weights": 4 * parameters,
        "gradients": 4 * trained,
        "optimizer": 8 * trained,  # fp32: the weights are the main weights
    }


def test_the_stopwatch_counts_collectives_once(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["clocked"] == {
        "one": 1.0,
        "started and waited for": 2.0,
        "made of others": 1.0,
        "failed": 1.0,
        "none": 0.0,
        "stopped": 0.0,
    }


def test_a_trace_holds_the_steps_asked_for(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        traced = rank["traced"]
        assert traced["files"] == [
            f"steps-2-3.rank-0000{number}.{end}" for number in (0, 1) for end in ("json.gz", "txt")
        ]
        assert traced["optimizers"] == 2 * 2  # dense and expert parameters, two steps
        assert traced["recomputed"] == 2 * 2  # blocks, steps
        assert "aten::mm" in traced["table"]


@pytest.mark.parametrize("case", [name for name in RECOMPUTING if not name.endswith("none")])
def test_recomputation_changes_no_bit(case: str, ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        steps = rank["recomputed"][case]
        assert steps == rank["recomputed"][f"{case.rsplit(' ', 1)[0]} none"]
        assert all(norm > 0 for _, norm in steps)


@pytest.mark.parametrize("case", list(EMPTY))
def test_a_model_built_without_memory_is_the_same_model(
    case: str, ranks: list[dict[str, Any]]
) -> None:
    for rank in ranks:
        compared = rank["empty"][case]
        assert compared.pop("parameters") > 10_000
        assert compared == {
            "names": True,
            "differing": [],
            "marks": [],
            "buffers": [],
            "rotary": True,
        }


def test_what_cannot_be_is_refused() -> None:
    recipe = Recipe()
    recipe.trainer.recompute = "some"
    recipe.trainer.profile = ProfileConfig([3, 2], "some")
    problems = "; ".join(validate(recipe))
    assert "trainer.recompute is 'some', it must be one of none, selective, full" in problems
    assert "trainer.profile.ranks is 'some'" in problems
    for steps in ([3, 2], [2], [0, 1], [recipe.trainer.steps, recipe.trainer.steps + 1]):
        recipe.trainer.profile.steps = steps
        assert f"trainer.profile.steps is {steps}" in "; ".join(validate(recipe))
    recipe.trainer.profile.steps = [1, recipe.trainer.steps]
    assert "profile.steps" not in "; ".join(validate(recipe))


def test_a_peak_is_measured_once_and_a_known_gpu_is_looked_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = iter([5e9, 7e9, 9e9])
    monkeypatch.setattr(peak, "_measure", lambda precision: next(measured))
    first = peak.matrix_peak("fp32", tmp_path)
    assert (first.operations, peak.matrix_peak("fp32", tmp_path)) == (5e9, first)
    assert peak.matrix_peak("bf16", tmp_path).operations == 7e9
    (tmp_path / "peaks.json").write_text("damaged")
    assert peak.matrix_peak("fp32", tmp_path).operations == 9e9
    known = peak.vendor_figure("NVIDIA H100 80GB HBM3")
    assert known is not None
    assert known.operations == 989.4e12
    assert peak.vendor_figure("NVIDIA H100 PCIe") == peak.Peak(
        756.5e12, "data sheet of H100 PCIe, dense bf16"
    )
    assert peak.vendor_figure("Radeon") is None
