"""Runs of one recipe that differ in their seeds only."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from unimoe_mcore.config.stage import OWN_MLP
from unimoe_mcore.reporting.results import Judged, Results
from unimoe_mcore.reporting.runs import Run

_ELSEWHERE = ("name", "paths", "logging", "parallel")
"""Groups of a recipe that change nothing of what is learnt."""
_SOURCES = ("base", "start", "experts", "shared_expert", "connectors", "init_from")
"""Settings of a stage that name other runs."""


def repeated(results: Results) -> list[list[Judged]]:
    """The given runs that were judged, by recipe; recipes with a single run are left out."""
    found: dict[str, list[Judged]] = {}
    for judged in results.finals:
        found.setdefault(_recipe(judged.run), []).append(judged)
    return [same for same in found.values() if len(same) > 1]


def _recipe(run: Run) -> str:
    """The run's recipe and those of the runs that it stands on, without seeds and names."""
    plain = {key: value for key, value in run.config.items() if key not in _ELSEWHERE}
    stage = plain.get("stage")
    if isinstance(stage, dict):
        plain["stage"] = stage | {key: _without_names(stage.get(key)) for key in _SOURCES}
    before = sorted(_recipe(each) for each in run.stands_on)
    return json.dumps([_without_seeds(plain), before, run.data], sort_keys=True, default=str)


def _without_names(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_names(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_names(inner) for inner in value]
    return value if value in ("", OWN_MLP, None) else "a run"


def _without_seeds(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_seeds(inner) for key, inner in value.items() if key != "seed"}
    if isinstance(value, list):
        return [_without_seeds(inner) for inner in value]
    return value


def spread(values: Iterable[float]) -> str:
    """Mean of some shares, and the lowest and the highest of them."""
    shares = list(values)
    mean = sum(shares) / len(shares)
    return f"{mean:.2f} ({min(shares):.2f}\u00a0to\u00a0{max(shares):.2f})"
