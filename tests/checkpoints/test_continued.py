"""Runs that go on otherwise than they began, and runs that begin with another run's weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoints.cases_layouts import contents
from tests.conftest import World
from tests.distributed import run_distributed
from tests.workspace import branch
from unimoe_mcore.runtime.run_directory import read_lines

STILL = ["trainer.lr=1e-30", "trainer.steps=1", "trainer.warmup=0"]
"""Weights stay what they began as, to the last bit but for zeros."""
STEPS = "trainer.resume_changes=[steps]"


@pytest.fixture(scope="module")
def place(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A world with base and stage 1, and a checkpoint on another base."""
    folder = branch(world.folder, tmp_path_factory.mktemp("continued") / "w", "base", "stage1")
    stranger = folder / "stranger"
    shutil.copytree(world.folder / "runs/stage1/checkpoints/step-00000004", stranger)
    state = json.loads((stranger / "state.json").read_text())
    state["sources"]["base"] = "f" * 64
    (stranger / "state.json").write_text(json.dumps(state))
    return folder


@pytest.fixture(scope="module")
def runs(place: Path) -> dict[str, Any]:
    """What became of every run, all in one launch of two processes."""
    first = place / "runs/first"

    def begins_with(what: str, *extra: str) -> list[str]:
        return [*STILL, f"stage.init_from={place / what}", *extra]

    cases = {
        "first": ("first", []),
        "more, not allowed": ("first", ["trainer.steps=6"]),
        "lr, done": ("first", ["trainer.lr=1e-4", "trainer.resume_changes=[lr]"]),
        "begins with the run": ("second", begins_with("runs/first")),
        "begins with what it gave": ("third", begins_with("runs/first/gives")),
        "more": ("first", ["trainer.steps=6", STEPS]),
        "less": ("first", ["trainer.steps=3", STEPS]),
        "more and lr": (
            "first",
            ["trainer.steps=8", "trainer.lr=1e-4", "trainer.resume_changes=[lr,steps]"],
        ),
        "nothing there": ("fourth", begins_with("nowhere")),
        "another base": ("fourth", begins_with("stranger")),
        "nothing that trains": ("fourth", begins_with("runs/base/gives")),
        "another shape": (
            "fourth", begins_with("runs/first", "model.towers.speech.connector.stack=4"),
        ),
    }  # fmt: skip
    listed = [{"name": name, "extra": extra} for name, extra in cases.values()]
    ranks = run_distributed(
        "tests.checkpoints.cases_continued:runs", 2, timeout=240, folder=str(place), cases=listed
    )
    assert ranks[0] == ranks[1]
    assert first.is_dir()
    return dict(zip(cases, ranks[0], strict=True))


def losses(run: dict[str, Any]) -> list[float]:
    assert not run["refused"]
    return [line["loss"] for line in run["metrics"]]


def test_more_steps_after_the_end_must_be_allowed(runs: dict[str, Any]) -> None:
    words = runs["more, not allowed"]["refused"]
    assert "first was started with other settings (trainer.steps 4 -> 6)" in words
    assert "or allow the change by trainer.resume_changes=[steps]" in words


def test_a_finished_run_goes_on_and_gives_anew(runs: dict[str, Any], place: Path) -> None:
    assert len(losses(runs["first"])) == 4
    assert losses(runs["more"])[:4] == losses(runs["first"])
    assert len(losses(runs["more"])) == 6
    assert (runs["first"]["steps"], runs["more"]["steps"]) == (4, 6)
    assert runs["first"]["hash"] != runs["more"]["hash"]
    events = [e for e in read_lines(place / "runs/first/events.jsonl") if "changes" in e]
    assert events[0]["changes"] == ["trainer.steps 4 -> 6"]


def test_another_rate_is_taken_if_it_is_allowed(runs: dict[str, Any]) -> None:
    rates = [line["lr"] for line in runs["more and lr"]["metrics"]]
    assert rates[:6] == [line["lr"] for line in runs["more"]["metrics"]]
    assert 0 < max(rates[6:]) <= 1e-4 < min(rates[1:4])
    assert runs["more and lr"]["steps"] == 8


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("lr, done", "first is done, trainer.lr 0.002 -> 0.0001 would change nothing"),
        ("less", "first has done 6 steps already, they cannot be undone by trainer.steps=3"),
        ("nothing there", "is no run with a checkpoint, no checkpoint, and nothing that"),
        ("another base", "was trained on base ffffffffffff, this run stands on"),
        ("nothing that trains", "has nothing that trains here"),
        ("another shape", "connector.speech.norm.weight has shape [96]"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(
    name: str, words: str, runs: dict[str, Any]
) -> None:
    assert words in runs[name]["refused"]
    assert "\n" not in runs[name]["refused"]


@pytest.mark.parametrize("run", ["second", "third"])
def test_a_run_begins_with_another_runs_weights(
    run: str, runs: dict[str, Any], place: Path, world: World
) -> None:
    assert runs["begins with the run"]["refused"] == ""
    before = contents(place / "runs/first-4")
    after = contents(place / f"runs/{run}/checkpoints/step-00000001")
    fresh = contents(world.folder / "runs/stage1/checkpoints/step-00000002")
    assert before.keys() == after.keys() == fresh.keys()
    for name in (name for name in before if name.startswith("model.")):
        assert torch.allclose(before[name][1], after[name][1], rtol=0, atol=1e-20), name
        assert not torch.equal(before[name][1], fresh[name][1])
    assert {step for name, (step, _) in after.items() if name.startswith("optimizer.")} == {1}
    (event,) = [
        e for e in read_lines(place / f"runs/{run}/events.jsonl") if e["event"] == "began with"
    ]
    assert event["parts"]["left out"] == 0
    assert sum(event["parts"].values()) == sum(name.startswith("model.") for name in before)
