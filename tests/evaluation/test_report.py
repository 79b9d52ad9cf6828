"""The report of a small invented schedule: its numbers, its verdict, its pictures."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from data_pipeline.shards.index import DatasetFacts, Manifest
from unimoe_mcore.config.errors import UserError
from unimoe_mcore.evaluation.report import write_report
from unimoe_mcore.evaluation.results import Results, gather

ORDER = [("base", "before", "untrained"), ("stage1", "before", "before stage1")]
ORDER += [("stage3", "after", "stage3")]
TASKS = {"img_group": ("image", 40, 0.25), "spk_digit": ("speech", 10, 0.4)}
TASKS |= {"txt_cap": ("text", 20, 0.1)}
"""Task -> group, held-out questions, share of the most frequent answer."""

EXPERTS = {
    "image": {"0": [4, 4, 0], "2": [3, 3, 2]},
    "speech": {"0": [4, 0, 4], "2": [3, 3, 2]},
    "text": {"0": [4, 2, 2], "2": [3, 3, 2]},
}
"""Tokens that each of three experts got, in the blocks 0 and 2, of every question of a group."""


def judged(
    hits: dict[str, int], loss: dict[str, Callable[[int], float]], experts: bool = False
) -> list[dict[str, Any]]:
    """Records of some tasks: the first ``hits`` questions right; two label tokens each."""
    records = []
    for task, right in hits.items():
        group, total, _ = TASKS[task]
        for index in range(total):
            record = {"dataset": task, "group": group, "key": f"q{index}", "tokens": 2}
            record |= {"exact": index < right, "loss": 2 * loss[task](index)}
            records.append(record | ({"experts": EXPERTS[group]} if experts else {}))
    return records


def write_run(runs: Path, name: str, when: str, records: Sequence[dict[str, Any]]) -> None:
    (runs / name / "evaluation").mkdir(parents=True)
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (runs / name / "evaluation" / f"{when}.test.jsonl").write_text(lines)
    steps = [
        {"step": step, "loss/image": 5.0 - step, "seconds": 1.5, "tokens_per_second": speed}
        for step, speed in enumerate((10, 30, 20, 40), 1)
    ]
    (runs / name / "metrics.jsonl").write_text("".join(json.dumps(s) + "\n" for s in steps))
    version = {"commit": "0123456789abcdef+", "packages": {"torch": "2.14.1"}}
    version |= {"cpu": "a processor", "cores": 2, "python": "3.12.1"}
    (runs / name / "version.json").write_text(json.dumps(version | {"run": name}))


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    facts = {task: DatasetFacts("x", n, 4, share) for task, (_, n, share) in TASKS.items()}
    return Manifest(
        tmp_path, "tests/1", 0, {}, {}, ("no videos: ffmpeg is missing.",), {"test": facts}, ()
    )


def run_schedule(runs: Path, manifest: Manifest, hits: dict[str, int], speech: float) -> Results:
    """Text falls from 6 to 1, pictures from 4 to 1, speech changes by ``speech``, give or take."""
    begun = {"txt_cap": lambda _: 6.0}
    write_run(runs, "base", "before", judged({"txt_cap": 0}, begun))
    begun = {"txt_cap": lambda _: 5.0, "img_group": lambda _: 4.0, "spk_digit": lambda _: 3.0}
    write_run(runs, "stage1", "before", judged({"img_group": 4, "spk_digit": 0}, begun))
    ended = {
        "txt_cap": lambda i: 1.0 + 0.01 * (i % 2),
        "img_group": lambda i: 1.0 + 0.01 * (i % 2),
        "spk_digit": lambda i: 3.0 + speech + (1 if i % 2 else -1),
    }
    write_run(runs, "stage3", "after", judged(hits, ended, experts=True))
    return gather(runs, ORDER, manifest, "test")


@pytest.fixture
def report(tmp_path: Path, manifest: Manifest) -> str:
    hits = {"img_group": 30, "spk_digit": 5, "txt_cap": 20}
    results = run_schedule(tmp_path / "runs", manifest, hits, speech=-0.1)
    path = write_report(results, ["base", "image", "speech"], tmp_path / "report")
    return path.read_text("utf8")


def row(report: str, *beginning: str) -> list[str]:
    """Cells of the one table row that begins with these."""
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in report.splitlines()
        if line.startswith("| ")
    ]
    (found,) = [
        cells
        for cells in rows
        if all(c.startswith(b) for c, b in zip(cells, beginning, strict=False))
    ]
    return found


def test_exact_answers(report: str) -> None:
    head = row(report, "task")
    assert head[1:] == ["questions", "majority", *(o[2] for o in ORDER), "95 % interval"]
    assert row(report, "`img_group`")[1:] == ["40", "0.25", "", "0.10", "0.75", "0.60 to 0.86"]
    assert row(report, "`spk_digit`")[1:] == ["10", "0.40", "", "0.00", "0.50", "0.24 to 0.76"]
    assert row(report, "`txt_cap`")[1:] == ["20", "0.10", "0.00", "", "1.00", "0.84 to 1.00"]
    assert row(report, "**mean**")[3:6] == ["", "", "**0.75**"]  # the others asked fewer tasks
    assert "answers **75%** of the held-out questions exactly (mean over 3 tasks, 70 q" in report


def test_held_out_loss_is_compared_with_the_first_time_it_was_asked(report: str) -> None:
    change = row(report, "image", "40", "4.000")
    assert change[3:] == ["1.005", "-2.995", "-2.997 to -2.993", "lower"]
    assert row(report, "text", "20", "6.000")[3:5] == ["1.005", "-4.995"]
    # -1.1 and 0.9 by turns: -0.1, give or take 1.96 * 1.0541 / sqrt(10)
    change = row(report, "speech", "10", "3.000")
    assert change[3:] == ["2.900", "-0.100", "-0.753 to +0.553", "**not lower**"]


def test_what_was_not_learnt_is_named(report: str) -> None:
    assert "**Not above the majority answer** beyond the 95 % interval: spk_digit." in report
    assert "**Held-out loss did not fall** by more than its interval: speech." in report
    assert "Every task is above" not in report


def test_where_it_comes_from(report: str) -> None:
    for words in ("commit 0123456789ab+, a processor, 2 cores, Python 3.12.1, torch 2.14.1",
                  "Note: no videos: ffmpeg is missing."):  # fmt: skip
        assert words in report
    for run in ("base", "stage1", "stage3"):
        assert row(report, run, "4", "6") == [run, "4", "6", "30"]


def test_which_experts_the_tokens_go_to(report: str) -> None:
    assert row(report, "block", "modality")[2:] == ["base", "image", "speech"]
    assert row(report, "0", "image")[2:] == ["0.50", "0.50", "0.00"]
    assert row(report, "0", "speech")[2:] == ["0.50", "0.00", "0.50"]
    assert row(report, "2", "text")[2:] == ["0.38", "0.38", "0.25"]
    # Distances 1/2, 1/4, 1/4 in block 0; none in block 2, where all modalities are alike.
    _, between, shuffled, high = row(report, "0", "0.")
    assert between == "0.333"
    assert 0 < float(shuffled) <= float(high) < 0.333
    assert row(report, "2", "0.0")[1:] == ["0.000", "0.000", "0.000"]


def test_there_are_pictures(report: str, tmp_path: Path) -> None:
    for name in ("losses.png", "accuracy.png", "experts.png"):
        assert f"]({name})" in report
        with Image.open(tmp_path / "report" / name) as picture:
            picture.load()
            assert min(picture.size) > 100
            assert len(set(picture.convert("L").getdata())) > 10  # something is drawn


def test_good_news_without_experts(tmp_path: Path, manifest: Manifest) -> None:
    hits = {"img_group": 40, "spk_digit": 10, "txt_cap": 20}
    results = run_schedule(tmp_path / "runs", manifest, hits, speech=-2.0)
    for record in results.columns[-1].records:
        del record["experts"]
    report = write_report(results, [], tmp_path / "report").read_text("utf8")
    assert "- Every task is above its majority answer beyond the 95 % interval." in report
    assert "- The held-out loss of every modality fell by more than its 95 % inter" in report
    assert "experts" not in report
    assert not (tmp_path / "report" / "experts.png").exists()


def test_a_run_that_was_not_judged_is_named(tmp_path: Path, manifest: Manifest) -> None:
    with pytest.raises(
        UserError, match=r"base/evaluation/before\.test\.jsonl is missing: run base "
    ):
        gather(tmp_path / "runs", ORDER, manifest, "test")
