"""The numbers of a report are those that anybody would count from the records."""

from __future__ import annotations

import itertools
import json
import math
import random
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.reporting.made_up import (
    BLOCKS,
    TASKS,
    Tables,
    answers,
    lines,
    write_run,
    write_schedule,
)
from unimoe_mcore.reporting.document import Document, Figure, Panel, Table
from unimoe_mcore.reporting.markdown import inline, markdown
from unimoe_mcore.reporting.page import page
from unimoe_mcore.reporting.results import gather
from unimoe_mcore.reporting.sections import document

GROUPS = ["image", "video", "speech", "text"]


def records(run: Path, when: str = "after") -> list[dict[str, Any]]:
    text = (run / "evaluation" / f"{when}.test.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def wilson(hits: int, n: int) -> tuple[float, float]:
    """The interval's ends solve ``(p - hits / n) ** 2 = z ** 2 * p * (1 - p) / n``."""
    z2 = 1.959964**2
    a, b, c = 1 + z2 / n, -(2 * hits / n + z2 / n), (hits / n) ** 2
    root = math.sqrt(max(0.0, b * b - 4 * a * c))
    return (-b - root) / (2 * a), (-b + root) / (2 * a)


def close(cell: str, value: float, digits: int = 2) -> bool:
    """Whether a cell begins with a value, rounded."""
    return abs(float(cell.split()[0]) - value) <= 0.5001 * 10**-digits


@pytest.mark.usefixtures("without_pictures")
@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(seed=st.integers(0, 2**32))
def test_every_number_is_recounted(seed: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        runs = write_schedule(Path(folder), seed, data="0" * 64)
        report = document(gather([runs / "stage3", runs / "dense"]))
        tables = Tables(page(report))
        mixture, dense = records(runs / "stage3"), records(runs / "dense")
        check_answers(tables, mixture, dense)
        check_comparison(tables, mixture, dense)
        check_loss(tables, mixture, runs)
        check_costs(tables, runs)
        check_experts(tables, mixture)


def check_answers(
    tables: Tables, mixture: list[dict[str, Any]], dense: list[dict[str, Any]]
) -> None:
    for heading, key in (("Held-out questions", "dataset"), ("By modality", "group")):
        rows = {row[0].split()[0]: row for row in tables.under(heading)}
        names = TASKS if key == "dataset" else GROUPS
        for name in names:
            for answered, cell in zip((mixture, dense), rows[name][-2:], strict=True):
                mine = [r["exact"] for r in answered if r[key] == name]
                low, high = wilson(sum(mine), len(mine))
                assert close(cell, sum(mine) / len(mine))
                assert cell.split(" ", 1)[1] == f"({abs(low):.2f} to {high:.2f})"
        if key == "dataset":
            assert [rows[name][2] for name in names] == ["0.25"] * 4


def check_comparison(
    tables: Tables, mixture: list[dict[str, Any]], dense: list[dict[str, Any]]
) -> None:
    (row,) = tables.under("Run against run")[1:]
    pairs = [(m["exact"], d["exact"]) for m, d in zip(mixture, dense, strict=True)]
    assert row[:2] == ["stage3", "dense"]
    assert row[3:] == ["36", str(pairs.count((False, True))), str(pairs.count((True, False)))]


def check_loss(tables: Tables, mixture: list[dict[str, Any]], runs: Path) -> None:
    """Text was first asked before the base, all else before stage 1."""
    rows = {row[0]: row for row in tables.under("Held-out loss")}
    first = records(runs / "base", "before") + [
        r for r in records(runs / "stage1", "before") if r["group"] != "text"
    ]
    for group in GROUPS:
        before = sum(r["loss"] for r in first if r["group"] == group) / 18
        after = sum(r["loss"] for r in mixture if r["group"] == group) / 18
        assert close(rows[group][3], before, 3)
        assert close(rows[group][4], after, 3)
        assert close(rows[group][5], after - before, 3)


def check_costs(tables: Tables, runs: Path) -> None:
    for row in tables.under("Training")[1:]:
        steps = [json.loads(x) for x in (runs / row[0] / "metrics.jsonl").read_text().splitlines()]
        tokens = sum(step["tokens"] for step in steps)
        assert row[1:5] == ["4", "48", f"{tokens:,}", "160"]
        assert row[5] == f"{1 - tokens / 1024:.1%}"
        assert row[6:] == ["2,500", "2.0", "10.0%", "20.0%", "1.0 GiB"]


def check_experts(tables: Tables, mixture: list[dict[str, Any]]) -> None:
    rows = tables.under("Modality share per expert")
    assert rows[0] == ["block", "modality", "base (1)", "image", "base (2)"]
    distances = tables.under("stage3")  # the first table under the run's heading
    for block, distance in zip(BLOCKS, distances[1:], strict=True):
        shares = {}
        for group in GROUPS:
            counts = [r["experts"][str(block)] for r in mixture if r["group"] == group]
            sums = [sum(column) for column in zip(*counts, strict=True)]
            shares[group] = [each / sum(sums) for each in sums]
            (row,) = [r for r in rows[1:] if r[:2] == [str(block), group]]
            assert all(close(c, s) for c, s in zip(row[2:], shares[group], strict=True))
        apart = [
            sum(abs(p - q) for p, q in zip(shares[a], shares[b], strict=True)) / 2
            for a, b in itertools.combinations(GROUPS, 2)
        ]
        assert close(distance[1], sum(apart) / len(apart), 3)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_schedule(tmp_path_factory.mktemp("made up"))


def test_both_forms_hold_the_same_tables(runs: Path) -> None:
    report = document(gather([runs / "stage3"]))
    shown = [
        [[inline(cell).replace("\u00a0", " ") for cell in row] for row in table.rows]
        for table in every(report.blocks, Table)
    ]
    text, files = markdown(report)
    for table in shown:
        for row in table:
            assert "| " + " | ".join(row) + " |" in text
    assert len(shown) == len(Tables(page(report)).found)
    pictures = [panel.svg for each in every(report.blocks, Figure) for panel in each.panels]
    assert [files[path].decode() for path in re.findall(r"report-files/[^)]*svg", text)] == pictures
    assert all(picture in page(report) for picture in pictures)


def test_pictures_of_one_name_have_a_file_each() -> None:
    names = ("losses-lr0-1", "losses-lr0-1", "losses-LR0-1", "losses-lr0-1-2")
    panels = [Panel(name, f"<svg>{number}</svg>", "x") for number, name in enumerate(names)]
    text, files = markdown(Document([Figure(panels[:2]), Figure(panels[2:])]))
    paths = re.findall(r"report-files/[^)]*svg", text)
    assert [files[path].decode() for path in paths] == [panel.svg for panel in panels]
    assert len({path.lower() for path in paths}) == len(panels)


def every(blocks: Any, kind: type) -> Iterator[Any]:
    """All blocks of a kind, folded ones too."""
    for block in blocks:
        if isinstance(block, kind):
            yield block
        yield from every(getattr(block, "blocks", []), kind)


def test_a_run_is_followed_to_those_it_stands_on(runs: Path) -> None:
    results = gather([runs / "stage3"])
    assert [run.title for run in results.runs] == ["base", "stage1", "stage2-image", "stage3"]
    titles = [judged.title for judged in results.stages]
    assert titles == [
        "before base", "base", "before stage1", "stage1", "stage2-image", "stage3",
    ]  # fmt: skip
    assert results.notes == []


@pytest.mark.usefixtures("without_pictures")
def test_the_ways_are_those_recorded(runs: Path) -> None:
    record = json.loads((runs / "stage3" / "evaluation" / "after.test.pathways.json").read_text())
    rows = Tables(page(document(gather([runs / "stage3"])))).under("Most travelled ways")
    names = ["base (1)", "image", "base (2)"]
    for group, kind, way, share, tokens, ways in rows[1:]:
        known = record["groups"][group][kind]
        (first, count), total = known["paths"][0], known["tokens"]
        assert way == " → ".join(names[expert] for expert in first)
        assert (share, tokens, ways) == (f"{count / total:.2f}", f"{total:,}", "9")


@pytest.mark.usefixtures("without_pictures")
def test_examples_have_right_and_wrong_answers_and_their_media(runs: Path) -> None:
    results = gather([runs / "stage3", runs / "dense"])
    (shown,) = [b for b in document(results).blocks if type(b).__name__ == "Examples"]
    answered = {f"{r['dataset']}/{r['key']}": r for r in records(runs / "stage3")}
    assert len(shown.items) == 10
    assert {item.name.split("/")[0] for item in shown.items} == set(TASKS)
    assert {item.answers[0].exact for item in shown.items} == {True, False}
    for item in shown.items:
        assert item.notes == []
        assert [answer.run for answer in item.answers] == ["stage3", "dense"]
        assert item.answers[0].exact == answered[item.name]["exact"]
        assert item.answers[0].said == answered[item.name]["said"]
        kinds = [medium.kind for medium in item.media]
        sound = item.name.startswith("spk")
        assert kinds == (["sound"] if sound else [] if "twins" in item.name else ["picture"])
        assert item.right in ("red", "green", "blue", "low", "middle", "high")


@pytest.mark.usefixtures("without_pictures")
def test_a_dense_run_alone_has_no_experts(runs: Path) -> None:
    html = page(document(gather([runs / "dense"])))
    assert ">Experts<" not in html
    assert "It answers" in html


@pytest.mark.usefixtures("without_pictures")
def test_what_was_learnt_and_what_not_is_said(tmp_path: Path) -> None:
    rng = random.Random(1)
    good = [r | {"exact": r["dataset"] != "twins"} for r in answers(rng, list(TASKS))]
    write_run(tmp_path / "runs", "stage1", {"kind": "align"}, "0", rng, {"after": good})
    text, _ = markdown(document(gather([tmp_path / "runs" / "stage1"])))
    assert "answers **75%** of the held-out questions exactly (mean over 4 tasks, 36 que" in text
    assert "**Not above the majority answer** beyond the 95 % interval: twins." in text
    path = tmp_path / "runs" / "stage1" / "evaluation" / "after.test.jsonl"
    path.write_text(lines([r | {"exact": True} for r in good]))
    text, _ = markdown(document(gather([tmp_path / "runs" / "stage1"])))
    assert "- Every task is above its majority answer beyond the 95 % interval." in text


@pytest.mark.usefixtures("without_pictures")
def test_runs_that_differ_in_seeds_only_are_taken_together(tmp_path: Path) -> None:
    runs = write_schedule(tmp_path, data="0" * 64)
    for name, key, value in (
        ("stage3-b", "seed", 7),
        ("stage3-c", "seed", 8),
        ("faster", "lr", 0.1),
    ):
        shutil.copytree(runs / "stage3", runs / name)
        config = json.loads((runs / name / "config.yaml").read_text())
        config |= {"name": name, "trainer": config["trainer"] | {key: value}}
        (runs / name / "config.yaml").write_text(json.dumps(config))
        again = answers(random.Random(name), list(TASKS))
        (runs / name / "evaluation" / "after.test.jsonl").write_text(lines(again))
    given = ["stage3", "dense", "stage3-b", "faster", "stage3-c"]
    tables = Tables(page(document(gather([runs / name for name in given]))))
    rows = tables.under("Over seeds")
    assert rows[0] == ["modality", "stage3, stage3-b, stage3-c"]
    for group, row in zip(GROUPS, rows[1:], strict=False):
        shares = [
            sum(r["exact"] for r in records(runs / name) if r["group"] == group) / 9
            for name in ("stage3", "stage3-b", "stage3-c")
        ]
        mean = sum(shares) / 3
        assert row == [group, f"{mean:.2f} ({min(shares):.2f} to {max(shares):.2f})"]
