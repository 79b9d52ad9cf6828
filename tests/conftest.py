"""What all tests share: this process made ready for Megatron, and a small trained world."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import run_distributed
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
