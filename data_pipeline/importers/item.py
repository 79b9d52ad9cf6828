"""What an importer yields: one question with its media and its answer."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from data_pipeline.shards.schema import PLACEHOLDERS


@dataclass(frozen=True, slots=True)
class MediaFile:
    """The bytes of one medium.

    Attributes:
        modality: one of ``MODALITIES``.
        extension: of the file format, without the dot.
        data: the file's bytes.
    """

    modality: str
    extension: str
    data: bytes


@dataclass(frozen=True, slots=True)
class Item:
    """A question, its answer, and the media that the question is about.

    Attributes:
        split: ``train``, ``val`` or ``test``.
        question: what the human says after the media; may be empty for plain text.
        answer: what is to be said.
        media: the media; each gets its placeholder before the question.
        source: what is held out of the other splits: an emoji's name, a pair, a voice, a language,
            a drum kit. For tests; it is not written to the shards.
    """

    split: str
    question: str
    answer: str
    media: tuple[MediaFile, ...] = ()
    source: str = ""

    @property
    def prompt(self) -> str:
        """The human turn: placeholders, then the question."""
        return "\n".join([*(PLACEHOLDERS[each.modality] for each in self.media), self.question])


@dataclass(frozen=True)
class Task:
    """A dataset to be built: its name and how its items are made.

    Attributes:
        name: name of the dataset.
        expected: number of items, about; for the progress display.
        items: makes the items; the same ones at every call.
        closed: every answer of val and test must occur in train.
    """

    name: str
    expected: int
    items: Callable[[], Iterator[Item]]
    closed: bool = True


def generator(seed: int, name: str) -> random.Random:
    """A random stream of its own for each name, so that tasks do not disturb one another."""
    return random.Random(f"{seed}/{name}")


def three_way[T](
    things: Sequence[T], rng: random.Random, val: float, test: float
) -> dict[str, list[T]]:
    """Shuffle ``things`` and divide them into train, val and test.

    Args:
        things: what must not be shared between splits; at least 3.
        rng: where the order comes from.
        val: share for validation; at least one thing.
        test: share for the test; at least one thing.
    """
    order = list(things)
    rng.shuffle(order)
    tests = max(1, round(len(order) * test))
    vals = max(1, round(len(order) * val))
    return {
        "test": order[:tests],
        "val": order[tests : tests + vals],
        "train": order[tests + vals :],
    }
