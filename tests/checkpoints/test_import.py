"""Folders of transformers as bases: logits and losses are those of transformers' own models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed import run_distributed

TOLERANCE = 1e-4
"""Of the largest logit, fp32. Measured: at most 2.2e-6 for these models."""

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
        "tests.checkpoints.cases_import:one_process", 1, timeout=240, folder=str(folder)
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
    assert found.get("unscaled", 1) > 0.1  # where positions are scaled, that matters
    assert found["files"] > 1 if "several" in case else found["files"] == 1


def test_a_mixtral_is_the_stage_3_of_its_experts_and_router(
    results: dict[str, Any], folder: Path
) -> None:
    ranks = run_distributed(
        "tests.checkpoints.cases_import:two_processes", 2, timeout=240, folder=str(folder)
    )
    for found in (results["mixtral"], *ranks):
        assert found["difference"] < TOLERANCE
        assert found["losses"] < TOLERANCE
        assert found["deviation"] > 1


def test_rows_that_fill_up_are_never_said_by_any_tensor_rank(
    results: dict[str, Any], folder: Path
) -> None:
    """Of 320 rows 53 fill up: they lie on the second of two ranks."""
    assert results["multi-head"]["rows"] == 320
    for rank in run_distributed(
        "tests.checkpoints.cases_import:tensor_ranks", 2, timeout=120, folder=str(folder)
    ):
        assert rank["rows"] == 160
        assert rank["losses"] < TOLERANCE


def test_fused_experts_are_those_of_the_older_form(results: dict[str, Any]) -> None:
    older, newer = results["hashes"]
    assert len(older) == 1 + 3 + 1  # base, experts, router
    assert len(set(older)) == 5
    assert newer == older


def test_a_llava_is_a_base_and_a_connector_that_a_stage_takes(results: dict[str, Any]) -> None:
    found = results["llava"]
    assert found["difference"] < TOLERANCE
    assert found["connector"] == 0  # the same weights, the same three operations
    assert set(found["skipped"]) == {"the vision tower: encoders come from their own packages"}
