"""Held-out losses while a run trains, and its best checkpoint."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoints.cases_layouts import contents
from tests.conftest import World
from tests.distributed import run_distributed
from tests.workspace import branch
from unimoe_mcore.checkpoints.training import CheckpointFolder

ANSWERED = ["trainer.evaluation.after=true", "trainer.evaluation.split=val"]
EVERY = ["trainer.validation.every=2", "trainer.validation.most=0"]
STEPS = ["trainer.steps=8", "trainer.checkpoint_every=8", "trainer.keep=1"]
RISING = ["trainer.lr=3", "trainer.warmup=8", "trainer.clip=0"]
"""Of a base: the rate grows until the weights are worse than what they began as."""


@pytest.fixture(scope="module")
def place(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return branch(world.folder, tmp_path_factory.mktemp("validated") / "w", "base", "stage1")


@pytest.fixture(scope="module")
def runs(place: Path) -> dict[str, Any]:
    """All in one launch of two processes."""
    cases = {
        "not validated": ("unwatched", [*STEPS, "trainer.validation.every=0"]),
        "validated": ("watched", [*STEPS, *EVERY, *ANSWERED]),
        "killed": ("parted", [*STEPS, *EVERY, "trainer.checkpoint_every=4"]),
        "continued": ("parted", [*STEPS, *EVERY, "trainer.checkpoint_every=4"]),
        "two stages": ("staged", [*STEPS, *EVERY, *ANSWERED, "parallel.pipeline=2"]),
        "rising": ("rising", [*STEPS, *EVERY, *ANSWERED, *RISING]),
        "gives its best": (
            "rising-best",
            [*STEPS, *EVERY, *ANSWERED, *RISING, "trainer.validation.give=best"],
        ),
        "few questions": (
            "few", [*STEPS, "trainer.validation.every=8", "trainer.validation.most=2"],
        ),
        "none to ask": (
            "none",
            [*STEPS, *EVERY, "data.evaluation_datasets=[nothing]"],
        ),
    }  # fmt: skip
    listed = {
        label: {
            "name": name,
            "extra": extra,
            "stop": 4 if label == "killed" else 0,
            "recipe_name": "base" if name.startswith("rising") else "stage1",
        }
        for label, (name, extra) in cases.items()
    }
    ranks = run_distributed(
        "tests.training.cases_validation:runs", 2, timeout=240, folder=str(place), cases=listed
    )
    assert ranks[0] == ranks[1]
    found: dict[str, Any] = ranks[0]
    return found


def test_training_does_not_notice_it(runs: dict[str, Any]) -> None:
    plain, validated = runs["not validated"], runs["validated"]
    assert len(plain["metrics"]) == 8
    for one, other in zip(plain["metrics"], validated["metrics"], strict=True):
        for name in ("loss", "grad_norm", "lr"):
            assert one[name] == other[name]
    assert not plain["lines"]


def test_lines_say_what_the_evaluation_says(runs: dict[str, Any]) -> None:
    lines, answers = runs["validated"]["lines"], runs["validated"]["answers"]
    assert [line["step"] for line in lines] == [2, 4, 6, 8]
    last = lines[-1]
    assert last["asked"] == last["answered"] == len(answers) == 36
    tokens = sum(a["tokens"] for a in answers)
    assert math.isclose(last["loss"], sum(a["loss"] for a in answers) / tokens, rel_tol=1e-12)
    for group in {a["group"] for a in answers}:
        own = [a for a in answers if a["group"] == group]
        mean = sum(a["loss"] for a in own) / sum(a["tokens"] for a in own)
        assert math.isclose(last[f"loss/{group}"], mean, rel_tol=1e-12)
    for dataset in {a["dataset"] for a in answers}:
        hits = [a["exact"] for a in answers if a["dataset"] == dataset]
        assert last[f"exact/{dataset}"] == sum(hits) / len(hits)


def test_a_pipeline_measures_the_same(runs: dict[str, Any]) -> None:
    for one, other in zip(runs["validated"]["lines"], runs["two stages"]["lines"], strict=True):
        # Later steps have trained in another summation order.
        assert math.isclose(one["loss"], other["loss"], rel_tol=1e-5)


def test_the_best_checkpoint_is_kept(runs: dict[str, Any], place: Path) -> None:
    lines = runs["rising"]["lines"]
    best = min(lines, key=lambda line: line["loss"])["step"]
    assert best < 8, "the weights were meant to become worse"
    folder = CheckpointFolder(place / "runs/rising/checkpoints", keep=1)
    assert folder.best() == folder.at(best)
    assert {path.name for path in folder.finished()} == {
        folder.at(8).name,
        folder.at(best).name,
    }


def test_a_stage_gives_its_best_weights_if_it_is_asked_to(
    runs: dict[str, Any], place: Path
) -> None:
    lines, answers = runs["gives its best"]["lines"], runs["gives its best"]["answers"]
    assert lines[0]["loss"] == runs["rising"]["lines"][0]["loss"]
    best = min(lines, key=lambda line: line["loss"])
    tokens = sum(a["tokens"] for a in answers)
    assert math.isclose(best["loss"], sum(a["loss"] for a in answers) / tokens, rel_tol=1e-12)
    saved = contents(place / f"runs/rising-best/checkpoints/step-{best['step']:08d}")
    given = contents(place / "runs/rising-best/gives")
    other = contents(place / "runs/rising/gives")
    for name, (_, tensor) in given.items():
        assert torch.equal(tensor, saved[f"model.{name}"][1].to(tensor.dtype)), name
    assert any(not torch.equal(tensor, other[name][1]) for name, (_, tensor) in given.items())


def test_a_killed_run_continues_its_lines(runs: dict[str, Any], place: Path) -> None:
    assert [line["step"] for line in runs["killed"]["lines"]] == [2, 4]
    whole = [{**line, "seconds": 0} for line in runs["validated"]["lines"]]
    assert [{**line, "seconds": 0} for line in runs["continued"]["lines"]] == whole
    mark = json.loads((place / "runs/parted/checkpoints/best.json").read_text())
    assert mark["step"] == min(whole, key=lambda line: line["loss"])["step"]


def test_few_questions_are_spread_over_every_dataset(runs: dict[str, Any]) -> None:
    (line,) = runs["few questions"]["lines"]
    assert line["asked"] == 12
    assert {name for name in line if name.startswith("exact/")} == {
        name for name in runs["validated"]["lines"][0] if name.startswith("exact/")
    }


def test_a_split_without_questions_is_refused(runs: dict[str, Any]) -> None:
    assert "questions for this stage" in runs["none to ask"]["refused"]
