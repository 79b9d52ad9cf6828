"""The samples that a run leaves out, and why: ``quarantine.jsonl``, one line each."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_pipeline.errors import DataError
from data_pipeline.reading.sample import KINDS

_MOST_REASON = 500  # characters


@dataclass(frozen=True)
class Broken:
    """One line of the quarantine.

    Attributes:
        step: the step, from 0, that was the first to go without the sample.
        dataset: its dataset.
        shard: file name of its tar.
        key: its key.
        kind: one of ``KINDS``.
        reason: what is wrong, in words.
    """

    step: int
    dataset: str
    shard: str
    key: str
    kind: str
    reason: str


class Quarantine:
    """The lines of a quarantine, on disk and in memory.

    An entry holds from its step on: steps before it had the sample, and a replay from an earlier
    checkpoint must have it there again and lack it where it was lacking.

    Args:
        path: the file; need not exist. A last line that a kill cut off is dropped.
        writes: whether this process reads and writes it; others are told (``restore``), since a
            file on a network may look different from another machine.

    Attributes:
        path: the file.
        entries: its lines, in order.

    Raises:
        DataError: the file is something else.
    """

    def __init__(self, path: Path, writes: bool = True) -> None:
        self.path = path
        self.entries: list[Broken] = []
        self._writes = writes
        self._since: dict[tuple[str, str], int] = {}
        if writes:
            self._keep(_load(path))

    def __len__(self) -> int:
        return len(self.entries)

    def until(self, step: int) -> list[Broken]:
        """The samples that a step goes without, each once; not what later steps found."""
        found = {(e.dataset, e.key): e for e in self.entries if e.step <= step}
        return list(found.values())

    def holds(self, dataset: str, key: str, step: int) -> bool:
        """Whether a step must go without a sample."""
        since = self._since.get((dataset, key))
        return since is not None and since <= step

    def add(self, entries: Iterable[Broken]) -> None:
        """Take in what is not known yet; on disk when this returns.

        Raises:
            DataError: the file cannot be written.
        """
        new = self._keep(entries)
        if not new or not self._writes:
            return
        text = "".join(json.dumps(asdict(entry)) + "\n" for entry in new)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            appears = not self.path.exists()
            with self.path.open("a", encoding="ascii") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            if appears:
                _sync_folder(self.path.parent)
        except OSError as error:
            raise DataError(f"{self.path} cannot be written ({error.strerror})") from error

    def state(self) -> list[list[Any]]:
        """The entries as JSON values, for a run's state."""
        return [list(asdict(entry).values()) for entry in self.entries]

    def restore(self, state: Iterable[Any]) -> None:
        """Take in the entries of a state, should the file have been lost.

        Raises:
            DataError: the state is damaged.
        """
        try:
            self.add([_checked(dict(zip(Broken.__annotations__, e, strict=True))) for e in state])
        except (TypeError, ValueError) as error:
            raise DataError(f"the quarantine in the state is damaged ({error})") from error

    def _keep(self, entries: Iterable[Broken]) -> list[Broken]:
        """Remember entries; those that are new or hold from an earlier step than was known."""
        new = []
        for entry in entries:
            name = (entry.dataset, entry.key)
            if name not in self._since or entry.step < self._since[name]:
                self._since[name] = entry.step
                new.append(entry)
        self.entries += new
        return new


def _sync_folder(folder: Path) -> None:
    """Make sure that a new file's name survives the machine, not only its content."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _load(path: Path) -> list[Broken]:
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror})") from error
    whole, newline, torn = text.rpartition(b"\n")
    if torn:
        partial = path.with_name(f".{path.name}.partial")
        partial.write_bytes(whole + newline)
        partial.replace(path)
    entries = []
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            entries.append(_checked(json.loads(line)))
        except (TypeError, ValueError, RecursionError) as error:
            raise DataError(
                f"{path} line {number} is no entry of a quarantine ({error}): delete that line"
            ) from error
    return entries


def _checked(record: Any) -> Broken:
    """An entry from JSON values.

    Raises:
        TypeError, ValueError: it is none.
    """
    entry = Broken(**record)
    words = (entry.dataset, entry.shard, entry.key, entry.kind, entry.reason)
    if type(entry.step) is not int or not all(isinstance(word, str) for word in words):
        raise ValueError("a value has another type")
    if entry.kind not in KINDS:
        raise ValueError(f"unknown kind {entry.kind!r}")
    return entry


def broken_entry(step: int, dataset: str, shard: str, key: str, kind: str, reason: str) -> Broken:
    """An entry with a reason of bounded length."""
    short = reason if len(reason) <= _MOST_REASON else reason[:_MOST_REASON] + " ..."
    return Broken(step, dataset, shard, key, kind, short)
