"""What all tests share: this process made ready for Megatron, and a small trained world."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import run_distributed
from tests.workspace import DATASETS, branch, questions
from unimoe_mcore.runtime.devices import prepare_device

prepare_device()  # before any test imports Megatron


@dataclass(frozen=True)
class World:
    """The tiny world of ``tests.workspace`` with its whole schedule trained.

    Attributes:
        folder: holds ``data``, ``cache`` and ``runs``; nobody may change what is in there
            (``tests.workspace.branch`` makes a copy for that), new runs may be added.
        losses: run -> losses of its steps.
    """

    folder: Path
    losses: dict[str, Any]


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Data and all stages of the tiny world, trained by two processes in one launch."""
    folder = tmp_path_factory.mktemp("world")
    ranks = run_distributed(
        "tests.training.cases_stages:whole_schedule", 2, timeout=240, folder=str(folder)
    )
    assert ranks[0] == ranks[1]
    return World(folder, ranks[0])


@dataclass(frozen=True)
class Asked:
    """A run that has something to say, and what it said.

    Attributes:
        run: its folder.
        prompts: some of the held-out questions.
        rows: dataset, number, right answer of each.
        answers: to each, with the experts on two processes.
        exact: whether the evaluation would call these answers exact.
        printed: what ``generate --json`` printed in each of two processes.
    """

    run: Path
    prompts: list[Any]
    rows: list[tuple[str, int, str]]
    answers: list[dict[str, Any]]
    exact: list[bool]
    printed: list[str]

    @property
    def folder(self) -> Path:
        """The world that it was trained in."""
        return self.run.parent.parent


@pytest.fixture(scope="session")
def asked_in(world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Asked]:
    """The run ``asked``, trained by two processes, which then answer questions; by precision."""
    from tests.generation.cases_generation import prepared

    runs = ("base", "stage1", "stage2-image", "stage2-speech", "stage2-audio")
    folder = branch(world.folder, tmp_path_factory.mktemp("asked") / "w", *runs)
    prompts, rows = [], []
    for dataset in DATASETS:
        for number, row in enumerate(questions(dataset, "test")[:3]):
            prompts.append(prepared(world.folder / "runs/stage3", row))
            rows.append((dataset, number, row[1]))
    path = folder / "prompts.pickle"
    path.write_bytes(pickle.dumps(prompts))
    ranks = run_distributed(
        "tests.generation.cases_generation:trained_and_asked",
        2,
        timeout=240,
        folder=str(folder),
        prompts=str(path),
    )
    printed = [rank.pop("printed") for rank in ranks]
    assert ranks[0] == ranks[1]
    found = {}
    for precision, first in ranks[0].items():
        run = folder / "runs" / first["name"]
        found[precision] = Asked(run, prompts, rows, first["answers"], first["exact"], printed)
    return found


@pytest.fixture(scope="session")
def asked(asked_in: dict[str, Asked]) -> Asked:
    """The run in fp32."""
    return asked_in["fp32"]
