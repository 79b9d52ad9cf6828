from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.distributed import RankError, run_distributed
from unimoe_mcore.config.parallel import (
    ParallelConfig,
    check_layout,
    check_tested,
    lockstep_ranks,
)
from unimoe_mcore.runtime.groups import layout_flags


@pytest.mark.parametrize(
    ("parallel", "world_size"),
    [
        (ParallelConfig(), 1),
        (ParallelConfig(), 7),
        (ParallelConfig(expert=2), 2),
        (ParallelConfig(tensor=2, sequence_parallel=True, expert=4, pipeline=2), 8),
        (ParallelConfig(tensor=2, sequence_parallel=True, expert=2, expert_tensor=2), 4),
        (ParallelConfig(pipeline=2), 4),
        (ParallelConfig(pipeline=2, virtual_pipeline=2), 2),
    ],
)
def test_possible_layouts(parallel: ParallelConfig, world_size: int) -> None:
    assert check_layout(parallel, world_size) == []


@pytest.mark.parametrize(
    ("parallel", "world_size", "problem"),
    [
        (ParallelConfig(expert=4), 2, "parallel.expert=4 x"),
        (ParallelConfig(pipeline=3), 4, "groups of 3, which do not divide 4 processes"),
        (ParallelConfig(virtual_pipeline=2), 2, "needs parallel.pipeline > 1"),
        (ParallelConfig(context=2), 2, "parallel.context=2 is not possible yet"),
        (ParallelConfig(tensor=2), 2, "needs parallel.sequence_parallel=true"),
        (ParallelConfig(sequence_parallel=True), 2, "needs parallel.tensor > 1"),
        (ParallelConfig(context=0), 2, "parallel.context is 0"),
        (ParallelConfig(), 0, "at least one process"),
    ],
)
def test_impossible_layouts(parallel: ParallelConfig, world_size: int, problem: str) -> None:
    assert any(problem in sentence for sentence in check_layout(parallel, world_size))


def test_every_problem_is_reported() -> None:
    problems = check_layout(ParallelConfig(tensor=2, expert=3, virtual_pipeline=2), 3)
    assert len(problems) == 3
    assert len(check_layout(ParallelConfig(tensor=-1, expert=0), 0)) == 3


UNTESTED = ParallelConfig(tensor=2, sequence_parallel=True, expert_tensor=2)


@pytest.mark.parametrize(
    "parallel",
    [
        ParallelConfig(),
        ParallelConfig(pipeline=4, expert=8),
        ParallelConfig(expert=2, expert_tensor=2),
        replace(UNTESTED, allow_untested=True),
    ],
)
def test_tested_layouts_and_allowed_ones_pass(parallel: ParallelConfig) -> None:
    assert check_tested(parallel) == []


def test_an_untested_layout_is_refused_with_what_was_tested() -> None:
    (sentence,) = check_tested(UNTESTED)
    assert "the layout tensor x expert_tensor was never compared" in sentence
    assert "parallel.allow_untested=true" in sentence
    for kind in ("pipeline x virtual_pipeline", "expert x expert_tensor", "data parallelism alone"):
        assert kind in sentence


@pytest.mark.parametrize(
    ("parallel", "ranks"),
    [
        (ParallelConfig(), 1),
        (ParallelConfig(expert=4), 4),
        (ParallelConfig(expert=2, expert_tensor=2), 4),
        (ParallelConfig(tensor=2, expert=2), 1),
        (ParallelConfig(tensor=2, expert=4), 2),
        (ParallelConfig(tensor=4, expert=2), 1),
        (ParallelConfig(tensor=2, expert=3), 3),
        (ParallelConfig(tensor=4, expert=6), 3),
    ],
)
def test_ranks_in_lockstep_are_those_that_share_experts(
    parallel: ParallelConfig, ranks: int
) -> None:
    """Against the definition: follow groups of experts from process to process."""
    assert lockstep_ranks(parallel) == ranks
    world = parallel.tensor * parallel.expert * parallel.expert_tensor * 4
    experts, linked = parallel.expert * parallel.expert_tensor, {0}
    while True:
        groups_met = {r * parallel.tensor // experts for r in linked} | {
            (r * parallel.tensor + parallel.tensor - 1) // experts for r in linked
        }
        more = {
            process // parallel.tensor
            for process in range(world)
            if process // experts in groups_met
        }
        if more == linked:
            break
        linked = more
    assert linked == set(range(ranks))


def test_interleaved_stages_do_not_batch_their_messages() -> None:
    assert layout_flags(ParallelConfig(pipeline=2, virtual_pipeline=2))["batch_p2p_comm"] is False
    flags = layout_flags(ParallelConfig(pipeline=2))
    assert flags["batch_p2p_comm"] is True
    assert flags["virtual_pipeline_model_parallel_size"] is None


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_distributed("tests.runtime.cases_groups:layouts", processes=2, timeout=90)


@pytest.mark.parametrize(
    ("layout", "groups"),
    [
        ("expert", {"tp": 1, "pp": 1, "ep": 2, "dp": 2, "expt_dp": 1}),
        ("tensor", {"tp": 2, "pp": 1, "ep": 1, "dp": 1, "expt_dp": 2}),
        ("pipeline", {"tp": 1, "pp": 2, "ep": 1, "dp": 1, "expt_dp": 1}),
        ("data", {"tp": 1, "pp": 1, "ep": 1, "dp": 2, "expt_dp": 2}),
    ],
)
def test_group_sizes(layout: str, groups: dict[str, int], ranks: list[dict[str, Any]]) -> None:
    assert all(results[layout]["sizes"] == groups for results in ranks)


def test_experts_differ_between_expert_ranks_and_nothing_else_does(
    ranks: list[dict[str, Any]],
) -> None:
    first, second = (results["expert"] for results in ranks)
    assert first["own"] == second["own"]
    assert first["expert"] != second["expert"]
    first, second = (results["data"] for results in ranks)
    assert (first["own"], first["expert"]) == (second["own"], second["expert"])


def test_stages_draw_different_numbers(ranks: list[dict[str, Any]]) -> None:
    first, second = (results["pipeline"] for results in ranks)
    assert first["own"] != second["own"]


def test_collectives_stay_within_their_group(ranks: list[dict[str, Any]]) -> None:
    assert [results["expert"]["ep sum"] for results in ranks] == [3.0, 3.0]
    assert [results["data"]["ep sum"] for results in ranks] == [1.0, 2.0]


def test_an_impossible_layout_is_refused_before_anything_is_set_up(
    ranks: list[dict[str, Any]],
) -> None:
    for results in ranks:
        assert "parallel.sequence_parallel=true" in results["refused"]
        assert not results["set up by then"]
        assert results["left"]


def test_a_rank_that_never_ends_is_ended() -> None:
    with pytest.raises(RankError, match="no end after 1 s"):
        run_distributed("signal:pause", processes=1, timeout=1, prepare=False)


def test_the_first_failure_is_the_one_reported() -> None:
    with pytest.raises(RankError, match=r"rank 1 failed first:\n(.*\n)*.*the culprit"):
        run_distributed(
            "tests.runtime.cases_groups:fail_on_one_rank", processes=2, timeout=60, prepare=False
        )
