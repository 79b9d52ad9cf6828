"""Folders of transformers as bases: logits and losses are those of transformers' own models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed import run_distributed

TOLERANCE = 1e-4
"""Of the largest logit, fp32. Measured: ??? for these models."""

CASES = (
    "multi-head",
    "grouped, in several files",
    "tied",
    "llama3",
    "linear",
    "even vocabulary",
    "mistral",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("import")


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, Any]:
    (rank,) = run_distributed(
        "tests.checkpoints.cases_import:all_cases", 1, timeout=240, folder=str(folder)
    )
    return rank


@pytest.mark.parametrize("case", CASES)
def test_logits_and_losses_are_those_of_transformers(case: str, results: dict[str, Any]) -> None:
    found = results[case]
    assert found["difference"] < TOLERANCE
    assert found["losses"] < TOLERANCE
    assert found["deviation"] > 1
    assert found["said"] == float("-inf")  # rows that fill up are never said
    assert found["rows"] % 64 == 0
    assert found["files"] > 1 if "several" in case else found["files"] == 1
