"""What mirrors show: the run directory's records as numbers by name."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unimoe_mcore.config.stage import OWN_MLP
from unimoe_mcore.evaluation.summary import ROUTING, routing_shares, summary
from unimoe_mcore.runtime.run_directory import RunDirectory, read_lines

VALIDATION = "validation"
"""How the names of held-out numbers begin."""


@dataclass(frozen=True)
class Row:
    """What is known of one step.

    Attributes:
        step: number of steps done.
        values: numbers by the names of ``metrics.jsonl``; those of ``validation.jsonl`` follow
            ``validation/``. Lists of a number for each expert are spread over its name.
        routing: where held-out tokens went: block -> modality -> share of every expert; empty if
            there was no evaluation or it did not look.
    """

    step: int
    values: dict[str, float]
    routing: dict[str, dict[str, list[float]]]


class Lines:
    """Reads a file of JSON lines from where it stopped, up to a step."""

    def __init__(self, path: Path) -> None:
        self._path, self._at = path, 0

    def until(self, step: int) -> Iterator[dict[str, Any]]:
        """The lines not read so far of steps up to this one."""
        if not self._path.is_file():
            return
        with self._path.open("rb") as file:
            file.seek(self._at)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                record = json.loads(line)
                if record["step"] > step:
                    return
                self._at += len(line)
                yield record


class Records:
    """Reads ``metrics.jsonl`` and ``validation.jsonl`` together."""

    def __init__(self, run: RunDirectory, experts: Sequence[str]) -> None:
        self._run, self._experts = run, experts
        self._metrics, self._validation = Lines(run.metrics_file), Lines(run.validation_file)

    def until(self, step: int) -> Iterator[Row]:
        """A row for every step up to this one that was not read so far."""
        held_out = {line["step"]: line for line in self._validation.until(step)}
        for line in self._metrics.until(step):
            found = held_out.get(line["step"], {})
            values = dict(_numbers("", line, self._experts))
            values |= dict(_numbers(VALIDATION, found, self._experts))
            values.pop(f"{VALIDATION}/step", None)
            yield Row(line["step"], values, found.get(ROUTING, {}))

    def answers(self, name: str, split: str, step: int) -> Row:
        """What the held-out answers of an evaluation come to.

        Args:
            name: ``before`` or ``after`` training.
            step: number of steps that were done.
        """
        records = read_lines(self._run.evaluation(name, split))
        return Row(step, dict(_numbers(name, summary(records), ())), routing_shares(records))


def _numbers(name: str, value: Any, experts: Sequence[str]) -> Iterator[tuple[str, float]]:
    """Every number of a record with its name; of names in a list, how many there are."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _numbers(f"{name}/{key}" if name else key, inner, experts)
    elif isinstance(value, list) and value and not isinstance(value[0], str):
        names = experts if len(experts) == len(value) else [str(n) for n in range(len(value))]
        for expert, inner in zip(names, value, strict=True):
            yield from _numbers(f"{name}/{expert}", inner, experts)
    elif isinstance(value, list):
        yield name, len(value)
    elif isinstance(value, int | float):
        yield name, value


def expert_names(entries: Sequence[str]) -> list[str]:
    """What each entry of ``stage.experts`` is called: by its run, without ``stage2-``."""
    names: list[str] = []
    for entry in entries:
        folder = Path(entry)
        named = folder.parent if folder.name == "gives" else folder
        name = OWN_MLP if entry == OWN_MLP else named.name.removeprefix("stage2-")
        names.append(f"{name}-{len(names)}" if name in names else name)
    return names
