"""Runs that are no runs, not done, damaged, moved, hostile: a sentence each, and a report."""

from __future__ import annotations

import json
import random
import shutil
import sys
from pathlib import Path

import pytest

from tests.reporting.made_up import TASKS, answers, lines, write_run, write_schedule
from unimoe_mcore.compose import speak
from unimoe_mcore.report import main
from unimoe_mcore.reporting.markdown import escaped, markdown
from unimoe_mcore.reporting.page import page
from unimoe_mcore.reporting.results import gather
from unimoe_mcore.reporting.sections import document


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_schedule(tmp_path_factory.mktemp("made up"), data="0" * 64)


@pytest.fixture
def runs(source: Path, tmp_path: Path) -> Path:
    """A copy that may be damaged, whose recipes still name the old place."""
    return Path(shutil.copytree(source, tmp_path / "runs"))


def text_of(*paths: Path) -> str:
    report = document(gather(paths))
    assert page(report).count("<section") == 0
    return markdown(report)[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{}/nowhere"], "nowhere is no run: it has no config.yaml that can be read"),
        (["{}/stage3/evaluation"], "evaluation is no run"),
        (["{}/stage3", "{}/broken"], "broken is no run"),
        (["{}/list"], "list is no run: its config.yaml is no recipe"),
        (["--to"], "--to is no option, or lacks its value"),
        (["--too", "x"], "--too is no option"),
        (["--to", "x"], "Name at least one run"),
        (["{}/stage3", "--to", "{}/stage3/config.yaml"], "config.yaml is no folder"),
    ],
)
def test_wrong_arguments_are_one_sentence(
    arguments: list[str],
    words: str,
    runs: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, config in (("broken", b"\xff{"), ("list", b"[1]")):
        (runs / name).mkdir()
        (runs / name / "config.yaml").write_bytes(config)
    monkeypatch.setattr(sys, "argv", ["report", *(a.format(runs) for a in arguments)])
    assert speak(main) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert words in said
    assert said.count("\n") == 1
    assert not list(runs.rglob("report.html"))


@pytest.mark.usefixtures("without_pictures")
def test_a_run_without_answers_is_named(runs: Path) -> None:
    shutil.rmtree(runs / "stage3" / "evaluation")
    text = text_of(runs / "stage3", runs / "dense")
    assert "stage3 has not answered the held-out questions of the split test" in text
    assert "stage3 has not recorded which experts its held-out tokens go to" in text
    assert "| dense |" in text
    for run in runs.iterdir():
        shutil.rmtree(run / "evaluation", ignore_errors=True)
    assert "No run has answered any yet." in text_of(runs / "stage3")


@pytest.mark.usefixtures("without_pictures")
def test_a_run_half_done_is_named(runs: Path) -> None:
    shutil.rmtree(runs / "stage3" / "gives")
    (runs / "stage3" / "evaluation" / "after.test.jsonl").unlink()
    metrics = runs / "stage3" / "metrics.jsonl"
    metrics.write_text(
        "".join(metrics.read_text().splitlines(keepends=True)[:2]) + '{"step": 3, "l'
    )
    assert "stage3 is not done (step 2 of 4)." in text_of(runs / "stage3")
    metrics.unlink()
    assert "stage3 is not done (no step yet)." in text_of(runs / "stage3")


@pytest.mark.usefixtures("without_pictures")
def test_runs_of_other_data_are_not_compared(runs: Path) -> None:
    (runs / "dense" / "data.txt").write_text("1" * 64)
    text = text_of(runs / "stage3", runs / "dense")
    assert "The runs were made from different data" in text
    assert "Run against run" not in text
    assert "Run against run" in text_of(runs / "stage3", runs / "stage2-image")


@pytest.mark.usefixtures("without_pictures")
def test_data_that_are_gone_leave_what_was_said(runs: Path) -> None:
    text = text_of(runs / "stage3")
    assert "are others by now: questions and media are not shown" in text
    assert "stage3 says: " in text


@pytest.mark.usefixtures("without_pictures")
def test_a_run_that_it_stands_on_is_missing(runs: Path, source: Path) -> None:
    config = json.loads((runs / "stage3" / "config.yaml").read_text())
    config["stage"]["start"] = str(runs / "gone" / "gives")
    (runs / "stage3" / "config.yaml").write_text(json.dumps(config))
    text = text_of(runs / "stage3")
    assert "The start of stage3, " in text
    assert "is not there any more" in text
    (runs / "imported").mkdir()
    config["stage"]["start"] = str(runs / "imported")
    (runs / "stage3" / "config.yaml").write_text(json.dumps(config))
    assert "is not there any more, or is another" not in text_of(runs / "stage3")


def test_moved_runs_find_each_other_by_what_they_are(runs: Path, source: Path) -> None:
    results = gather([runs / "stage3"])
    assert {run.path.parent.resolve() for run in results.runs} == {runs.resolve()}
    made = {"hash": "stage3", "steps": 4, "sources": {"base": "base"}}
    (runs / "stage3" / "gives" / "manifest.json").write_text(json.dumps(made))
    other = {"hash": "another", "steps": 4}
    (runs / "base" / "gives" / "manifest.json").write_text(json.dumps(other))
    base = gather([runs / "stage3"]).given[0].stands_on[0]
    assert base.path.resolve() == (source / "base").resolve()  # that beside it is another one


DAMAGED = [
    (
        "metrics.jsonl",
        b'[1]\n"x"\n{"step": "3"}\n{"step": 4, "seconds": "long", "loss/image": {}}\n',
    ),
    ("metrics.jsonl", b"\xff\xfe\x00"),
    ("validation.jsonl", b'{"step": 2, "loss/image": NaN}\n{"step": 3, "loss/image": [1]}\n'),
    ("version.json", b"[]"),
    ("events.jsonl", b'{"event": "evaluated after", "split": "test", "majority": [1]}\n'),
    ("evaluation/after.test.jsonl", b'{"dataset": 3}\n{"dataset": "x"}\n{}\n'),
    ("evaluation/after.test.pathways.json", b'{"blocks": [0, 2], "groups": {"image": 3}}'),
    ("evaluation/after.test.pathways.json", b"[" * 100_000),
    ("gives/manifest.json", b'{"sources": [1]}'),
    ("data.txt", b"\xff"),
]


@pytest.mark.usefixtures("without_pictures")
@pytest.mark.parametrize(("file", "content"), DAMAGED)
def test_damaged_records_are_passed_over(file: str, content: bytes, runs: Path) -> None:
    (runs / "stage3" / file).write_bytes(content)
    assert "# Report: stage3" in text_of(runs / "stage3")


def test_damaged_numbers_are_not_drawn(runs: Path) -> None:
    for file, content in DAMAGED[0], DAMAGED[2]:
        (runs / "stage3" / file).write_bytes(content)
    assert "losses-stage3.svg" in text_of(runs / "stage3")


@pytest.mark.usefixtures("without_pictures")
def test_a_run_that_names_itself_ends(runs: Path) -> None:
    config = json.loads((runs / "stage1" / "config.yaml").read_text())
    config["stage"]["init_from"] = str(runs / "stage3")
    (runs / "stage1" / "config.yaml").write_text(json.dumps(config))
    results = gather([runs / "stage3"])
    assert [run.title for run in results.runs].count("stage1") == 1
    assert "# Report" in text_of(runs / "stage3")


def test_two_runs_of_one_name_are_told_apart(runs: Path, source: Path) -> None:
    titles = [run.title for run in gather([runs / "stage3", source / "stage3"]).given]
    assert titles == [f"{runs.parent.name}/runs/stage3", f"{source.parent.name}/runs/stage3"]


HOSTILE = "</pre><script>window.taken=1</script><img src=x onerror='window.taken=1'>$\\frac{$ `|*"


def hostile(runs: Path, data: str = "0" * 64) -> Path:
    """A mixture whose every name and word is an attack."""
    rng = random.Random(0)
    records = answers(rng, list(TASKS), experts=True)
    for record in records:
        record |= {"said": HOSTILE, "key": record["key"]}
    records[0] |= {"dataset": HOSTILE, "group": HOSTILE, "key": HOSTILE}
    stage = {"kind": "moe", "experts": [HOSTILE, f"x/{HOSTILE[1:5]}/gives", "base"]}
    run = write_run(runs, "hostile", stage, data, rng, {"after": records})
    (run / "version.json").write_text(json.dumps({"cpu": HOSTILE, "packages": {HOSTILE: HOSTILE}}))
    metrics = [
        {"step": n, "seconds": 1.0, f"loss/{HOSTILE}": 1.0, "loss/image": 1.0} for n in (1, 2)
    ]
    (run / "metrics.jsonl").write_text(lines(metrics))
    return run


def test_text_of_data_is_text(tmp_path: Path) -> None:
    report = document(gather([hostile(tmp_path / "runs")]))
    html, text = page(report), markdown(report)[0]
    assert "<script" not in html
    assert "<img src=x" not in html
    assert "&lt;script&gt;window.taken" in html
    body = text[: text.index("## Configuration")]
    assert "<script" not in body.replace("\\<script", "")
    assert escaped(HOSTILE) in body
