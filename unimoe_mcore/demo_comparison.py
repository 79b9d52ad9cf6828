"""What the demo's runs are compared in: the arms, their tables and two pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from unimoe_mcore.checkpoints.files import write_text
from unimoe_mcore.config.recipe import Recipe
from unimoe_mcore.config.stage import OWN_MLP
from unimoe_mcore.runtime.run_directory import read_lines

if TYPE_CHECKING:
    from unimoe_mcore.reporting.comparison import Arm

SEEDS = (0, 1)
"""Of what a run initialises and of the order of its data."""

MIXTURES = ["stage3", "stage3-seed1"]
DENSE = ["dense", "dense-seed1"]
IDENTICAL = "identical"
COMPARED = (*MIXTURES, *DENSE, IDENTICAL)
"""Runs of the comparison, in the order of its columns."""


def write_comparison(
    recipes: Mapping[str, Recipe], base: str, command: str, name: str, folders: Sequence[Path]
) -> tuple[Path, str]:
    """Write the report of the compared runs, and tables and pictures of the comparison.

    Args:
        recipes: of all runs of the schedule, by name.
        base: what the base is, in one sentence.
        command: that was typed.
        name: of the comparison's files, ``name.md`` and pictures.
        folders: that get them, besides the report's.

    Returns:
        Path of the report; the tables.
    """
    from unimoe_mcore.reporting.comparison import comparison_tables
    from unimoe_mcore.reporting.comparison_figures import answers, experts
    from unimoe_mcore.reporting.results import gather
    from unimoe_mcore.reporting.shares import routing_of
    from unimoe_mcore.reporting.writing import write_report

    runs = Path(next(iter(recipes.values())).paths.runs)
    results = gather([runs / each for each in COMPARED])
    page, _ = write_report(results, runs / "report")
    arms = _arms(runs, list(recipes), len(recipes[IDENTICAL].stage.experts))
    table = comparison_tables(arms, results.majority)
    routing = routing_of(results.given[0])
    pictures = {f"{name}-answers": answers(arms, results.majority)}
    pictures |= {} if routing is None else {f"{name}-experts": experts(routing)}
    shown = [f"![{panel.words}]({file}.svg)" for file, panel in pictures.items()]
    parts = [_head(runs / MIXTURES[0], command), described(recipes, base), table, *shown]
    for folder in (page.parent, *folders):
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / f"{name}.md", "\n\n".join(parts) + "\n")
        for file, panel in pictures.items():
            write_text(folder / f"{file}.svg", panel.svg + "\n")
    return page, table


def _arms(folder: Path, names: Sequence[str], equal: int) -> list[Arm]:
    """Every compared run with what it took to train it.

    Args:
        folder: of the runs.
        names: of all runs of the schedule.
        equal: experts of the control.
    """
    from unimoe_mcore.reporting.comparison import Arm
    from unimoe_mcore.reporting.results import gather

    def tokens(name: str) -> int:
        return sum(int(line["tokens"]) for line in read_lines(folder / name / "metrics.jsonl"))

    titles = {name: f"MoE, seed {seed}" for name, seed in zip(MIXTURES, SEEDS, strict=True)}
    titles |= {name: f"dense, seed {seed}" for name, seed in zip(DENSE, SEEDS, strict=True)}
    titles[IDENTICAL] = f"{equal} equal experts"
    experts = sum(tokens(name) for name in names if name.startswith("stage2-"))
    arms = []
    for judged in gather([folder / name for name in COMPARED]).finals:
        name = judged.run.path.name
        seen = tokens(name) + (experts if name in MIXTURES else 0)
        trained = int(judged.run.event("start")["trained"])
        arms.append(Arm(replace(judged, title=titles[name]), seen, trained))
    return arms


def _head(run: Path, command: str) -> str:
    """What was run, when, on what."""
    version = json.loads((run / "version.json").read_text(encoding="utf8"))
    return (
        "# The mixture beside a dense model\n\n"
        f"{datetime.now(UTC):%Y-%m-%d}, commit {version['commit'][:12]}"
        f"{'+' if version['commit'].endswith('+') else ''}, {version['cpu']}, "
        f"{version['cores']} cores. Command: `{command}`."
    )


def described(recipes: Mapping[str, Recipe], base: str) -> str:
    """What was compared.

    Args:
        recipes: of all runs of the schedule, by name.
        base: what the base is, in one sentence.
    """
    mixture, control = (recipes[name].stage.experts for name in (MIXTURES[0], IDENTICAL))
    trained = [
        Path(each).parent.name.removeprefix("stage2-") for each in mixture if each != OWN_MLP
    ]
    return (
        f"{base} All models begin with the connectors of the same stage 1. The mixture goes on "
        f"with stage 2 (experts trained: {', '.join(trained)}) and stage 3 ({len(mixture)} "
        f"experts, {mixture.count(OWN_MLP)} of them the base's own MLP); the dense model trains "
        "LoRA and connectors on the mixed data for as many tokens. Seeds differ in stage 3 and in "
        f"the dense run. The {len(control)} equal experts take stage 3's steps only, without a "
        "stage 2."
    )
