"""Runs inside the processes of ``run_distributed``: runs that are validated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.training import cases_data
from unimoe_mcore.runtime.run_directory import read_lines


def runs(folder: str, cases: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """``cases_data.run`` for every case, with the lines and the answers that it wrote."""
    found = {}
    for label, case in cases.items():
        run = cases_data.run(folder, **case)
        path = Path(folder) / "runs" / case["name"]
        found[label] = {**run, "lines": lines(path / "validation.jsonl")}
        found[label]["answers"] = lines(path / "evaluation/after.val.jsonl")
    return found


def lines(path: Path) -> list[dict[str, Any]]:
    """Lines of a file that need not be there."""
    return read_lines(path) if path.is_file() else []
