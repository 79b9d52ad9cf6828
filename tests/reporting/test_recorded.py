"""What a trained world's evaluations record for the report, and its report."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from data_pipeline.conversation.tokenizer import TextTokenizer
from tests.conftest import World
from tests.workspace import questions
from unimoe_mcore.evaluation.pathways import Counted, Pathways
from unimoe_mcore.evaluation.questions import MOST_SAID, answer_in_words
from unimoe_mcore.report import main
from unimoe_mcore.reporting.results import gather
from unimoe_mcore.runtime.run_directory import read_lines


@pytest.fixture(scope="module")
def records(world: World) -> list[dict[str, Any]]:
    return read_lines(world.folder / "runs/stage3/evaluation/after.test.jsonl")


@pytest.fixture(scope="module")
def ways(world: World) -> dict[str, Any]:
    path = world.folder / "runs/stage3/evaluation/after.test.pathways.json"
    return dict(json.loads(path.read_text()))


def test_every_question_has_an_answer_in_words(world: World, records: list[dict[str, Any]]) -> None:
    right = {
        (dataset, f"{dataset}-{number:04d}"): answer
        for dataset in {record["dataset"] for record in records}
        for number, (_, answer, _) in enumerate(questions(dataset, "test"))
    }
    assert len(records) == len(right)
    for record in records:
        assert record["exact"] == (record["said"] == right[record["dataset"], record["key"]])


def test_ways_and_choices_are_of_the_same_tokens(
    records: list[dict[str, Any]], ways: dict[str, Any]
) -> None:
    assert set(ways["groups"]) == {record["group"] for record in records}
    for group, kinds in ways["groups"].items():
        for kind in kinds.values():
            assert sum(count for _, count in kind["paths"]) == kind["tokens"]  # few ways: all kept
            assert all(sum(row) == 2 * kind["tokens"] for row in kind["choices"])
        for place, block in enumerate(ways["blocks"]):
            both = [kind["choices"][place] for kind in kinds.values()]
            mine = [r["experts"][str(block)] for r in records if r["group"] == group]
            assert [sum(c) for c in zip(*both, strict=True)] == [
                sum(c) for c in zip(*mine, strict=True)
            ]
    assert "medium" not in ways["groups"]["text"]
    assert ways["groups"]["image"]["medium"]["tokens"] % 27 == 0  # as many for every picture


def test_rows_are_as_long_as_they_were_packed(world: World) -> None:
    for line in read_lines(world.folder / "runs/stage3/metrics.jsonl"):
        assert line["row_tokens"] % 32 == 0  # data.pad_to
        assert line["tokens"] <= line["row_tokens"] < line["tokens"] + 2 * 32 * line["microbatches"]


def test_the_report_of_a_trained_world(
    world: World, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    to = tmp_path_factory.mktemp("report")
    assert main([str(world.folder / "runs/stage3"), "--to", str(to)]) == 0
    assert str(to / "report.html") in capsys.readouterr().out
    assert (to / "report.html").stat().st_size < 5_000_000
    results = gather([world.folder / "runs/stage3"])
    assert results.notes == []
    assert results.majority["img_group"] == pytest.approx(1 / 3, abs=1e-4)


def test_an_answer_ends_at_the_first_wrong_token() -> None:
    tokenizer = TextTokenizer.train(["red green blue"] * 9, 300)
    red, green, end = tokenizer.encode("red"), tokenizer.encode("green"), tokenizer.end

    def said(likeliest: list[int], labels: list[int]) -> str:
        return answer_in_words(torch.tensor(likeliest), torch.tensor(labels), tokenizer)

    assert len(red) == len(green) == 1
    assert said([*red, end], [*red, end]) == "red"
    assert said([*green, end], [*red, end]) == "green ..."
    assert said([end, end], [*red, end]) == ""
    assert said([*red, *green], [*red, end]) == "red green ..."
    assert said([*red, end, *green, end], [*red, end, *green, end]) == "red / green"
    long = said(red * 300, red * 300)
    assert len(long) == MOST_SAID + 3


def test_counts_of_ranks_add_up() -> None:
    one, two = Pathways([7]), Pathways([7])
    two.blocks = [0, 2]
    two.counted[("image", "text")] = counted = Counted()
    counted.tokens, counted.paths[(0, 1)] = 3, 3
    counted.choices = torch.ones(2, 2).long().numpy()
    one.merge(two)
    one.merge(two)
    found = one.record()["groups"]["image"]["text"]
    assert found["tokens"] == 6
    assert found["paths"] == [[[0, 1], 6]]
    assert found["choices"] == [[2, 2], [2, 2]]
