"""Which tasks the quickstart's question set has, given the packages that can be had."""

from __future__ import annotations

from collections.abc import Callable

from data_pipeline.errors import DataError
from data_pipeline.importers.capitals import read_countries
from data_pipeline.importers.digits import DigitTasks
from data_pipeline.importers.emoji import EmojiTasks
from data_pipeline.importers.item import Task
from data_pipeline.importers.packages import PackageStore
from data_pipeline.importers.sounds import DrumTasks
from data_pipeline.importers.speech import SpokenDigits, SpokenQuestions
from data_pipeline.importers.text import (
    TwinKind,
    capital_task,
    capital_twin,
    drum_twin,
    emoji_twins,
    gloss_task,
    spoken_digit_twin,
    twin_task,
)

COUNTRIES, SMALL_COUNTRIES = 150, 6
TWINS, SMALL_TWINS = {"train": 16000, "val": 300}, {"train": 200, "val": 20}
GLOSSES, SMALL_GLOSSES = {"train": 3000, "val": 150}, {"train": 30, "val": 10}


class Quickstart:
    """The tasks of the quickstart.

    Sources that cannot be had are left out and named in ``notes``; without emoji the picture and
    video tasks use handwritten digits of a PyPI package instead.

    Attributes:
        tasks: what is to be built.
        notes: one sentence for each source that is missing: what, and why.
    """

    def __init__(self, store: PackageStore, seed: int, small: bool, pypi_only: bool):
        self.tasks: list[Task] = []
        self.notes: list[str] = []
        self._twins: list[TwinKind] = []
        self._store = store
        self._seed = seed
        self._small = small
        if pypi_only:
            self._add_digits()
        else:
            self._try("emoji pictures (handwritten digits instead)", self._add_emoji)
            if not self.tasks:
                self._add_digits()
            self._try("drum hits (aud_drum)", self._add_drums)
            self._try("recorded digits (spk_digit)", self._add_spoken_digits)
            self._try("capitals (txt_cap, spk_qa, spk_asr)", self._add_capitals)
            self._try("definitions (glosses)", self._add_glosses)
        self.tasks.append(twin_task(self._twins, seed, SMALL_TWINS if small else TWINS))

    def _try(self, what: str, add: Callable[[], None]) -> None:
        try:
            add()
        except DataError as error:
            self.notes.append(f"without {what}: {error}")

    def _add_emoji(self) -> None:
        emoji = EmojiTasks(self._store, self._seed, self._small)
        self.tasks += emoji.tasks()
        self._twins += emoji_twins(emoji.splits["train"], emoji.pairs()["train"])

    def _add_digits(self) -> None:
        digits = DigitTasks(self._seed, self._small)
        self.tasks += digits.tasks()
        self._twins += digits.twins()

    def _add_drums(self) -> None:
        self.tasks += DrumTasks(self._store, self._small).tasks()
        self._twins.append(drum_twin())

    def _add_spoken_digits(self) -> None:
        self.tasks += SpokenDigits(self._store, self._small).tasks()
        self._twins.append(spoken_digit_twin())

    def _add_capitals(self) -> None:
        number = SMALL_COUNTRIES if self._small else COUNTRIES
        countries = read_countries(self._store, self._seed, number)
        self.tasks.append(capital_task(countries))
        self._twins.append(capital_twin(countries))
        self._try(
            "spoken questions (spk_qa, spk_asr)",
            lambda: self.tasks.extend(
                SpokenQuestions(self._store, countries, self._seed, self._small).tasks()
            ),
        )

    def _add_glosses(self) -> None:
        sizes = SMALL_GLOSSES if self._small else GLOSSES
        self.tasks.append(gloss_task(self._store, self._seed, sizes))
