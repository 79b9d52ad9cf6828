"""Mixtures put together from published files: the right weights at the right place, or a word."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed import run_distributed

TOLERANCE = 1e-4
"""Of the largest logit, fp32. Measured: 8e-6."""

MERGED = 1e-6
"""Of the largest weight, fp32 beside fp64. Measured: 1.2e-7."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("official")


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, Any]:
    (rank,) = run_distributed(
        "tests.checkpoints.cases_official:all_cases", 1, timeout=400, folder=str(folder)
    )
    return rank


@pytest.mark.parametrize("order", ["order", "turned", "twice"])
def test_experts_are_where_the_recipe_names_them_bit_for_bit(
    order: str, results: dict[str, Any]
) -> None:
    assert results[order] == []


def test_a_released_adapter_is_added_to_its_expert(results: dict[str, Any]) -> None:
    assert results["adapted"]["sum"] < MERGED
    assert results["adapted"]["weights"] > 0.1  # it changes them


@pytest.mark.parametrize("placement", ["all", "interval"])
def test_logits_are_those_of_mixtral_with_the_published_weights(
    placement: str, results: dict[str, Any]
) -> None:
    found = results[placement]
    assert found["difference"] < TOLERANCE
    assert found["deviation"] > 1
    assert found["another order"] > 0.1  # the comparison can fail


REFUSED = {
    "missing": "s.bin cannot be used: model.layers.2.mlp.gate_proj.weight is missing.",
    "extra": "model.layers.0.self_attn.q_proj.weight is not known.",
    "shape": "model.layers.2.mlp.gate_proj.weight is [96, 63], not [96, 64].",
    "name": "gate_proj.weight is missing; model.layers.2.mlp.gat_proj.weight is not known.",
    "numbers": "model.layers.2.mlp.gate_proj.weight has no floating-point numbers",
    "block": "model.layers.4.mlp.gate_proj.weight is not known.",
    "twice": "it has a tensor twice, with and without prefix.",
    "several": "s.bin holds several experts (0, none): keep one in a file.",
    "adapter missing": "lora.bin cannot be used: "
    "model.layers.1.mlp.up_proj_lora_B.weight is missing.",
    "adapter shape": "model.layers.1.mlp.up_proj_lora_B.weight is [96, 9], not [96, 8].",
    "adapter extra": "model.layers.2.mlp.gate_proj.weight is not known.",
    "no adapter": "lora.bin cannot be used: it has no adapter",
    "placement": "has routers for the blocks [0, 1, 3] of 4, which is none of model.moe.placement",
    "router shape": "model.layers.2.mlp.gate.weight is [3, 64], not [4, 64].",
    "no routers": "s.bin holds no routers",
    "no base": "made/mlp_base1 was given by a stage of kind expert, it is no base.",
    "a base's folder": "base exists and is no converted expert: name another folder.",
    "absent": "There is no file made/spoilt.",
    "alpha": "--alpha is nan, it must be a number greater than 0.",
    "pointless": "--adapters are those of an expert: say --expert-of BASE.",
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_named(case: str, results: dict[str, Any]) -> None:
    assert REFUSED[case] in results["refusals"][case]


def test_nothing_half_made_is_left_behind(results: dict[str, Any]) -> None:
    assert results["refusals"]["left behind"] == ""


def test_the_command_says_what_it_took_and_what_not(results: dict[str, Any]) -> None:
    lines = results["printed"].splitlines()
    assert lines[0].startswith("made/vicuna: 0.07 M parameters in bfloat16 of 4 blocks, on base ")
    assert {line.split(": ", 2)[2] for line in lines[1:-1]} == {
        "attention: the base's is used",
        "norms: the base's are used",
        "embeddings: the base's are used",
    }
    assert lines[-1] == "stage.experts: [..., made/vicuna]"
