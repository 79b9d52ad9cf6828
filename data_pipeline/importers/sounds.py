"""Recorded drum hits (Debian ``hydrogen-data``, ``hydrogen-drumkits``): which instrument?

The file name says what was hit; names that match no instrument or several are left out. Held
out: whole drum kits. Copies of one recording in two kits are used once.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.importers.item import Item, Task
from data_pipeline.importers.packages import PackageStore
from data_pipeline.importers.recording import read_mono, wav

PACKAGES = ("hydrogen-data", "hydrogen-drumkits")
DRUM_QUESTION = "Which instrument is this sound?"
INSTRUMENTS = {
    "kick": r"kick|bass ?drum|\bbd\b",
    "snare": r"snare|\bsn\b|\bsd\b",
    "hi-hat": r"hat|\bhh",
    "tom": r"tom",
    "cymbal": r"crash|ride|cymbal|splash|china",
    "clap": r"clap",
}
"""Answer -> pattern in a file's name."""
HELD_OUT_KITS = {
    "test": (
        "ColomboAcousticDrumkit",
        "ElectricEmpireKit",
        "Millo_MultiLayered2",
        "TR808EmulationKit",
    ),
    "val": ("Millo-Drums_v.1", "Millo_MultiLayered3", "VariBreaks"),
}
"""Chosen so that val and test hold every instrument, none of them far more than a third, and both
have acoustic and electronic kits. Kits of one series are not divided between train and test."""


@dataclass(frozen=True)
class Hit:
    """One recorded hit.

    Attributes:
        path: the file.
        kit: name of its kit's folder.
        instrument: a key of ``INSTRUMENTS``.
    """

    path: Path
    kit: str
    instrument: str

    @property
    def split(self) -> str:
        """The split of its kit."""
        held = (split for split, kits in HELD_OUT_KITS.items() if self.kit in kits)
        return next(held, "train")


class DrumTasks:
    """The task over drum hits.

    Args:
        store: where the packages come from.
        small: a few items per split.

    Raises:
        PackageError: a package cannot be fetched.
    """

    def __init__(self, store: PackageStore, small: bool):
        hits = find_hits([store.get(name) for name in PACKAGES])
        self._hits = _first_of_each(hits, 2) if small else hits

    def tasks(self) -> list[Task]:
        """aud_drum."""
        return [Task("aud_drum", len(self._hits), self._items)]

    def _items(self) -> Iterator[Item]:
        seen: set[bytes] = set()
        for hit in self._hits:
            try:
                samples, rate = read_mono(hit.path)
            except DataError:
                continue  # a few files of the packages are in formats that no library reads
            content = hashlib.sha256(samples.tobytes()).digest()
            if content in seen or not np.any(samples):
                continue
            seen.add(content)
            sound = wav("audio", samples, rate)
            yield Item(hit.split, DRUM_QUESTION, hit.instrument, (sound,), hit.kit)


def find_hits(roots: list[Path]) -> list[Hit]:
    """Drum recordings below ``roots`` whose name matches exactly one instrument, in order."""
    hits = []
    for root in roots:
        kits = root / "usr/share/hydrogen/data/drumkits"
        for path in sorted(kits.rglob("*")):
            if path.suffix.lower() not in (".wav", ".flac", ".aiff"):
                continue
            name = re.sub(r"[_-]+", " ", path.name.lower())
            fits = [each for each, pattern in INSTRUMENTS.items() if re.search(pattern, name)]
            if len(fits) == 1:
                hits.append(Hit(path, path.relative_to(kits).parts[0], fits[0]))
    return hits


def _first_of_each(hits: list[Hit], number: int) -> list[Hit]:
    """The first ``number`` hits of each instrument and split."""
    counts: dict[tuple[str, str], int] = {}
    chosen = []
    for hit in hits:
        place = (hit.split, hit.instrument)
        counts[place] = counts.get(place, 0) + 1
        if counts[place] <= number:
            chosen.append(hit)
    return chosen
