"""One spoilt folder after another, for every reader in turn."""

from __future__ import annotations

import random
import shutil
from itertools import count, cycle
from pathlib import Path

from tests.fuzzing.mutations import spoil
from tests.fuzzing.outcome import Outcome, outcome
from tests.fuzzing.readers import READERS


class Campaign:
    """Spoils files and has them read; the same seed spoils the same.

    Attributes:
        names: of the readers.
    """

    def __init__(self, folder: Path, seed: int, names: list[str]) -> None:
        """Write what is right.

        Args:
            folder: for everything that is written.
        """
        self.names = names
        self._folder, self._seed = folder, seed
        self._turns, self._numbers = cycle(names), count()
        for name in names:
            READERS[name].make(folder / "right" / name)

    def next(self) -> tuple[str, Outcome, Path]:
        """Spoil a file and have it read.

        Returns:
            The reader, what it did, and the folder, which stays only if that was bad.
        """
        name, number = next(self._turns), next(self._numbers)
        chance = random.Random(f"{self._seed} {number}")
        spoilt = self._folder / f"spoilt-{number}"
        shutil.copytree(self._folder / "right" / name, spoilt)
        files = sorted(path for path in spoilt.rglob("*") if path.is_file())
        # Not by size: a model's config is as much a stranger's as its weights.
        for path in chance.sample(files, k=chance.choice((1, 1, 1, 2)) if len(files) > 1 else 1):
            path.write_bytes(spoil(path.read_bytes(), path.name, chance))
        found = outcome(READERS[name].read, spoilt, self._folder / "words")
        if found.good:
            shutil.rmtree(spoilt)
        return name, found, spoilt
