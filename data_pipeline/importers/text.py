"""Text: capitals in writing, and the corpora that the base language model is trained on.

``twins`` says in words what the other tasks show or play ("dog , cat. What is on the left?"), so
that a language model trained on it already knows every question and the form of its answer, and a
connector has only to say the right words. It uses training emoji, training pairs and training
paraphrases only.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.errors import DataError
from data_pipeline.importers.capitals import (
    QUESTION,
    TEST_QUESTION,
    TWIN_QUESTIONS,
    VAL_QUESTION,
    Country,
)
from data_pipeline.importers.emoji import GROUP_QUESTION, LEFT_QUESTION, Emoji
from data_pipeline.importers.item import Item, Task, generator
from data_pipeline.importers.packages import PackageStore
from data_pipeline.importers.pictures import COUNT_QUESTION, MAX_COUNT, MOVE_QUESTION
from data_pipeline.importers.sounds import DRUM_QUESTION, INSTRUMENTS
from data_pipeline.importers.speech import DIGIT_QUESTION

WORDNET = "wordnet-base"
NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
MOVES = {"left": "x 4 3 2 1", "right": "x 1 2 3 4", "up": "y 4 3 2 1", "down": "y 1 2 3 4"}
"""A movement in words: a coordinate over time, in pixels' sense (y grows downwards)."""
KEPT_SHARE = 0.1
"""Share of the reservable questions that are kept for validation."""

TwinMaker = Callable[[random.Random], tuple[str, str]]
"""Draws one question and its answer."""


@dataclass(frozen=True)
class TwinKind:
    """The verbal twin of one task.

    Attributes:
        make: draws a question and its answer.
        weight: how often, relative to the others.
        reserved: some questions can be kept for validation: the others tell enough to answer them.
    """

    make: TwinMaker
    weight: int = 1
    reserved: bool = False


def capital_task(countries: Sequence[Country]) -> Task:
    """txt_cap: one question per country and split; val and test each have their own wording."""

    def items() -> Iterator[Item]:
        wordings = (("train", QUESTION), ("val", VAL_QUESTION), ("test", TEST_QUESTION))
        for split, wording in wordings:
            for country in countries:
                yield Item(split, wording.format(country.name), country.capital, (), wording)

    return Task("txt_cap", 3 * len(countries), items)


def move_twin() -> TwinKind:
    """A coordinate over time: which way?"""

    def make(rng: random.Random) -> tuple[str, str]:
        direction = rng.choice(sorted(MOVES))
        return f"{MOVES[direction]}. {MOVE_QUESTION}", direction

    return TwinKind(make)


def count_twin(names: Sequence[str]) -> TwinKind:
    """A word repeated: how many?"""

    def make(rng: random.Random) -> tuple[str, str]:
        number = rng.randint(1, MAX_COUNT)
        return f"{' , '.join([rng.choice(names)] * number)}. {COUNT_QUESTION}", str(number)

    return TwinKind(make, reserved=True)


def left_twin(pairs: Sequence[tuple[str, str]], question: str) -> TwinKind:
    """Two words, from unordered training pairs: which one comes first?"""

    def make(rng: random.Random) -> tuple[str, str]:
        first, second = rng.sample(rng.choice(pairs), 2)
        return f"{first} , {second}. {question}", first

    return TwinKind(make, reserved=True)


def digit_twin(question: str) -> TwinKind:
    """A number word: which digit?"""

    def make(rng: random.Random) -> tuple[str, str]:
        digit = rng.randrange(10)
        return f"{rng.choice((NUMBER_WORDS[digit], str(digit)))}. {question}", str(digit)

    return TwinKind(make)


def emoji_twins(train: Sequence[Emoji], pairs: Sequence[tuple[Emoji, Emoji]]) -> list[TwinKind]:
    """Twins of img_group, img_count, img_left and vid_dir.

    Args:
        train: the training emoji.
        pairs: the training pairs.
    """

    def group(rng: random.Random) -> tuple[str, str]:
        emoji = rng.choice(train)
        return f"{emoji.name}. {GROUP_QUESTION}", emoji.group

    names = [(first.name, second.name) for first, second in pairs]
    words = sorted({emoji.name.split()[0].strip(":,") for emoji in train})
    return [TwinKind(group), count_twin(words), left_twin(names, LEFT_QUESTION), move_twin()]


def drum_twin() -> TwinKind:
    """An instrument's name: which instrument?"""

    def make(rng: random.Random) -> tuple[str, str]:
        instrument = rng.choice(sorted(INSTRUMENTS))
        return f"{instrument} sound. {DRUM_QUESTION}", instrument

    return TwinKind(make)


def spoken_digit_twin() -> TwinKind:
    """Twin of spk_digit."""
    return digit_twin(DIGIT_QUESTION)


def capital_twin(countries: Sequence[Country]) -> TwinKind:
    """Capitals in several wordings; the facts behind spk_qa and txt_cap."""

    def make(rng: random.Random) -> tuple[str, str]:
        country = rng.choice(countries)
        return rng.choice(TWIN_QUESTIONS).format(country.name), country.capital

    return TwinKind(make, weight=3, reserved=True)


def twin_task(kinds: Sequence[TwinKind], seed: int, sizes: Mapping[str, int]) -> Task:
    """The corpus of verbal twins; a validation question is never a training question.

    Args:
        kinds: what to draw from.
        seed: seed of the draws.
        sizes: split (train, val) -> number of items; val may get fewer where there are not so
            many different questions.
    """

    def is_kept(kind: TwinKind, question: str) -> bool:
        digest = hashlib.sha256(f"{seed}/{question}".encode()).digest()
        return kind.reserved and digest[0] < 256 * KEPT_SHARE

    def items() -> Iterator[Item]:
        rng = generator(seed, "twins")
        weights = [kind.weight for kind in kinds]
        taught: set[str] = set()
        kept: dict[str, str] = {}
        made = 0
        while made < sizes["train"]:
            kind = rng.choices(kinds, weights)[0]
            question, answer = kind.make(rng)
            if is_kept(kind, question):
                kept[question] = answer
                continue
            made += 1
            taught.add(answer)
            yield Item("train", question, answer)
        # In a small corpus an answer may be drawn for val only: it was never taught.
        fair = [(question, answer) for question, answer in kept.items() if answer in taught]
        for question, answer in fair[: sizes["val"]]:
            yield Item("val", question, answer)

    return Task("twins", sum(sizes.values()), items)


def gloss_task(store: PackageStore, seed: int, sizes: Mapping[str, int]) -> Task:
    """Definitions of nouns from WordNet, as plain text without a question.

    Args:
        store: where the package comes from.
        seed: seed of the choice.
        sizes: split (train, val) -> number of items.

    Raises:
        PackageError: the package cannot be fetched.
    """
    table = store.get(WORDNET) / "usr/share/wordnet/data.noun"

    def items() -> Iterator[Item]:
        glosses = read_glosses(table)
        needed = sum(sizes.values())
        if len(glosses) < needed:
            raise DataError(f"{table} holds {len(glosses)} glosses, {needed} are needed")
        chosen = iter(generator(seed, "glosses").sample(glosses, needed))
        for split, size in sizes.items():
            for _ in range(size):
                yield Item(split, "", next(chosen))

    return Task("glosses", sum(sizes.values()), items, closed=False)


def read_glosses(table: Path) -> list[str]:
    """The definitions of WordNet's ``data.noun`` that have 20 to 90 characters, each once.

    Raises:
        DataError: the table cannot be read.
    """
    try:
        lines = table.read_text("utf-8", errors="replace").splitlines()
    except OSError as error:
        raise DataError(f"{table} cannot be read: {error}") from error
    found: dict[str, None] = {}
    for line in lines:
        if not line.startswith("  ") and (match := re.search(r" \| ([^;\"]+)", line)):
            gloss = match[1].strip()
            if 20 <= len(gloss) <= 90 and gloss.isascii():
                found[gloss] = None
    return list(found)
