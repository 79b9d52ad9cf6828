"""Invented runs on real questions: a base, stage 1, an expert, a mixture and a dense model."""

from __future__ import annotations

import json
import random
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from data_pipeline.shards.index import load_manifest
from tests.workspace import build_data

TASKS = {"img_group": "image", "vid_dir": "video", "spk_digit": "speech", "twins": "text"}
"""Dataset of ``tests.workspace`` -> group; nine test questions each."""
BLOCKS, EXPERTS = (0, 2), 3

DRAWN = ("curves", "accuracy", "load", "share_of_modalities", "share_of_experts", "ways")
"""Functions of ``reporting.figures``."""

Records = list[dict[str, Any]]


def answers(rng: random.Random, tasks: list[str], experts: bool = False) -> Records:
    """One random record a question."""
    found = []
    for task in sorted(tasks):
        for number in range(9):
            exact = rng.random() < 0.6
            record: dict[str, Any] = {"dataset": task, "group": TASKS[task]}
            record |= {"key": f"{task}-{number:04d}", "exact": exact, "tokens": 2}
            record |= {"loss": 6 * rng.random(), "said": "red" if exact else "blue ..."}
            if experts:
                record["experts"] = {
                    str(block): [rng.randint(0, 9) for _ in range(EXPERTS)] for block in BLOCKS
                }
            found.append(record)
    return found


def ways(rng: random.Random) -> dict[str, Any]:
    """A record of pathways of every group."""
    groups = {}
    for group in TASKS.values():
        kinds = ("text",) if group == "text" else ("medium", "text")
        groups[group] = {}
        for kind in kinds:
            paths = [[[e, f], rng.randint(1, 50)] for e in range(EXPERTS) for f in range(EXPERTS)]
            paths.sort(key=lambda item: -item[1])
            tokens = sum(count for _, count in paths)
            choices = [[2 * tokens // EXPERTS] * EXPERTS for _ in BLOCKS]
            groups[group][kind] = {"tokens": tokens, "distinct": 9, "paths": paths}
            groups[group][kind]["choices"] = choices
    return {"blocks": list(BLOCKS), "groups": groups}


def lines(records: Records) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def write_run(
    runs: Path,
    name: str,
    stage: dict[str, Any],
    data: str,
    rng: random.Random,
    evaluations: dict[str, Records],
    done: bool = True,
) -> Path:
    """A run's directory of four steps."""
    run = runs / name
    (run / "evaluation").mkdir(parents=True)
    folder = str(runs.parent / "data" / "tiny")
    trainer = {"steps": 4, "evaluation": {"split": "test"}}
    recipe = {"name": name, "stage": stage, "data": {"folder": folder}, "trainer": trainer}
    (run / "config.yaml").write_text(json.dumps(recipe))  # JSON is YAML
    (run / "data.txt").write_text(data)
    version = {"commit": "0123456789abcdef+", "packages": {"torch": "2.14.1"}}
    version |= {"cpu": "a processor", "cores": 2, "python": "3.12.1"}
    (run / "version.json").write_text(json.dumps(version))
    steps = [
        {
            "step": step,
            "loss/image": 5.0 - step,
            "seconds": 30.0,
            "data_seconds": 3.0,
            "communication_seconds": 6.0,
            "samples": 12,
            "tokens": rng.randint(100, 200),
            "row_tokens": 256,
            "label_tokens": 40,
            "memory_bytes": 2**30,
            "tokens_per_second": speed,
        }
        for step, speed in enumerate((1000, 3000, 2000, 4000), 1)
    ]
    (run / "metrics.jsonl").write_text(lines(steps))
    majority = dict.fromkeys(TASKS, 0.25)
    events = [{"event": "start", "parameters": 8_000_000, "trained": 500_000}]
    events += [
        {"event": f"evaluated {w}", "split": "test", "majority": majority} for w in evaluations
    ]
    (run / "events.jsonl").write_text(lines(events))
    for when, records in evaluations.items():
        (run / "evaluation" / f"{when}.test.jsonl").write_text(lines(records))
        if records and "experts" in records[0]:
            path = run / "evaluation" / f"{when}.test.pathways.json"
            path.write_text(json.dumps(ways(rng)))
    if done:
        (run / "gives").mkdir()
        (run / "gives" / "manifest.json").write_text(json.dumps({"hash": name, "steps": 4}))
    return run


def write_schedule(folder: Path, seed: int = 0, data: str | None = None) -> Path:
    """All runs; returns the folder of the run directories.

    Args:
        data: digest of the data; without it real ones are built, and theirs is taken.
    """
    if data is None:
        data = load_manifest(build_data(folder / "data" / "tiny")).digest
    rng, runs = random.Random(seed), folder / "runs"
    base = {"kind": "base"}
    begun, every = answers(rng, ["twins"]), list(TASKS)
    write_run(runs, "base", base, data, rng, {"before": begun, "after": answers(rng, ["twins"])})
    on = {"base": str(runs / "base" / "gives"), "start": str(runs / "stage1" / "gives")}
    stage = {"kind": "align", "base": on["base"]}
    judged = {"before": answers(rng, every), "after": answers(rng, every)}
    write_run(runs, "stage1", stage, data, rng, judged)
    stage = {"kind": "expert", "expert": "image", **on}
    write_run(runs, "stage2-image", stage, data, rng, {"after": answers(rng, every)})
    experts = ["base", str(runs / "stage2-image" / "gives"), "base"]
    stage = {"kind": "moe", "experts": experts, **on}
    write_run(runs, "stage3", stage, data, rng, {"after": answers(rng, every, experts=True)})
    stage = {"kind": "expert", "expert": "image", **on}
    write_run(runs, "dense", stage, data, rng, {"after": answers(rng, every)})
    return runs


class Tables(HTMLParser):
    """Every table of a page as rows of cells, under the heading before it."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, list[list[str]]]] = []
        self._heading, self._in = "", ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag in ("h1", "h2", "h3", "h4"):
            self._heading, self._in = "", "heading"
        elif tag == "table":
            self.found.append((self._heading, []))
        elif tag == "tr":
            self.found[-1][1].append([])
        elif tag in ("td", "th"):
            self.found[-1][1][-1].append("")
            self._in = "cell"

    def handle_endtag(self, tag: str) -> None:
        if tag in ("h1", "h2", "h3", "h4", "td", "th"):
            self._in = ""

    def handle_data(self, data: str) -> None:
        if self._in == "heading":
            self._heading += data
        elif self._in == "cell":
            self.found[-1][1][-1][-1] += data.replace("\u00a0", " ")

    def under(self, heading: str) -> list[list[str]]:
        """The rows of the first table under a heading."""
        return next(rows for name, rows in self.found if name == heading)
