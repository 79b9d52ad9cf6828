"""Two ways of doing the same, in turn in one run: medians and their ratio."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from unimoe_mcore.reporting.sections import short
from unimoe_mcore.runtime.run_directory import code_version, machine

RESULTS = Path(__file__).parent / "results"


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def compare(
    what: str, ours: tuple[str, Callable[[], object]], theirs: tuple[str, Callable[[], object]],
    rounds: int = 9,
) -> str:  # fmt: skip
    """One row of a table: median milliseconds of both and theirs / ours."""
    ours[1](), theirs[1]()  # the first call of each is not counted
    pairs = [(seconds(ours[1]), seconds(theirs[1])) for _ in range(rounds)]
    a, b = (statistics.median(side) * 1e3 for side in zip(*pairs, strict=True))
    return f"| {what} | {ours[0]} {a:.1f} | {theirs[0]} {b:.1f} | {b / a:.2f} | {rounds} |"


def heading(name: str) -> str:
    """Command, date, machine, commit and versions behind a benchmark's figures."""
    version, here = code_version(), machine()
    command = f"`python -m benchmarks.{name} {' '.join(sys.argv[1:])}`".replace(" `", "`")
    return (
        f"{command}\non {datetime.now(UTC):%Y-%m-%d}, {here['cpu']}, {here['cores']} cores, "
        f"Python {here['python']}, commit {short(version['commit'])}, "
        + ", ".join(f"{k} {v}" for k, v in version["packages"].items())
    )


COLUMNS = ("case", "first, ms", "second, ms", "second / first", "rounds")


def write(
    name: str,
    claim: str,
    rows: list[str],
    columns: tuple[str, ...] = COLUMNS,
    notes: tuple[str, ...] = (),
) -> None:
    """Print the table and keep it under ``benchmarks/results/<name>.md``."""
    text = "\n".join(
        [
            f"# {claim}",
            "",
            heading(name),
            "",
            "| " + " | ".join(columns) + " |",
            "| --- " * len(columns) + "|",
            *rows,
            "",
            *(line for note in notes for line in (note, "")),
        ]
    )
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.md").write_text(text, encoding="utf8")
    print(text)
