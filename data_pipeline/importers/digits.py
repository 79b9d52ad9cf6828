"""Handwritten digits from the PyPI package scikit-learn: what is left where Debian is out of reach.

1,797 real digits of 8x8 pixels. Held out: a drawn digit belongs to one split in every task;
``img_left`` also shows pairs of digits that no other split has.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

import numpy as np
from PIL import Image

from data_pipeline.importers.item import Item, Task, generator, three_way
from data_pipeline.importers.pictures import (
    Drawing,
    canvas,
    count_items,
    jpeg,
    move_items,
    pair_item,
)
from data_pipeline.importers.text import (
    TwinKind,
    count_twin,
    digit_twin,
    left_twin,
    move_twin,
)

DIGIT_QUESTION = "Which digit is this picture?"
LEFT_QUESTION = "Which digit is on the left?"
SIDE = 128
"""Side of a drawn digit, pixels."""

_SIZES = {
    "img_digit": {"train": 1250, "val": 180, "test": 350},
    "img_count": {"train": 800, "val": 100, "test": 200},
    "img_left": {"train": 800, "val": 100, "test": 200},
    "vid_dir": {"train": 400, "val": 60, "test": 140},
}
_SMALL_SIZES = {
    "img_digit": {"train": 40, "val": 10, "test": 10},
    "img_count": {"train": 24, "val": 6, "test": 6},
    "img_left": {"train": 62, "val": 6, "test": 6},
    "vid_dir": {"train": 12, "val": 4, "test": 4},
}


class DigitTasks:
    """The picture and video tasks over handwritten digits.

    Args:
        seed: seed of the splits and pictures.
        small: a few items per task.
    """

    def __init__(self, seed: int, small: bool):
        self._seed = seed
        self._sizes = _SMALL_SIZES if small else _SIZES
        self._digits = three_way(read_digits(), generator(seed, "digits"), val=0.1, test=0.2)
        every = list(combinations(range(10), 2))
        self._pairs = three_way(every, generator(seed, "img_left"), val=0.1, test=0.2)

    def tasks(self) -> list[Task]:
        """img_digit, img_count, img_left and vid_dir."""
        makers = {
            "img_digit": self._digit_items,
            "img_count": self._count_items,
            "img_left": self._left_items,
            "vid_dir": self._move_items,
        }
        return [Task(name, sum(self._sizes[name].values()), make) for name, make in makers.items()]

    def twins(self) -> list[TwinKind]:
        """Verbal twins of these tasks."""
        names = [str(digit) for digit in range(10)]
        pairs = [(str(first), str(second)) for first, second in self._pairs["train"]]
        return [
            digit_twin(DIGIT_QUESTION),
            count_twin(names),
            left_twin(pairs, LEFT_QUESTION),
            move_twin(),
        ]

    def _digit_items(self) -> Iterator[Item]:
        rng = generator(self._seed, "img_digit")
        for split, size in self._sizes["img_digit"].items():
            for drawing in self._digits[split][:size]:
                picture = canvas(rng, 144, 144)
                picture.alpha_composite(drawing.image, (8, 8))
                yield Item(split, DIGIT_QUESTION, label(drawing), (jpeg(picture),), drawing.name)

    def _count_items(self) -> Iterator[Item]:
        yield from count_items(
            self._digits, self._sizes["img_count"], generator(self._seed, "img_count")
        )

    def _left_items(self) -> Iterator[Item]:
        rng = generator(self._seed, "img_left pictures")
        for split, size in self._sizes["img_left"].items():
            drawn: dict[str, list[Drawing]] = {}
            for drawing in self._digits[split]:
                drawn.setdefault(label(drawing), []).append(drawing)
            pairs = self._pairs[split]
            for index in range(size):
                first, second = pairs[index // 2 % len(pairs)]
                names = (str(first), str(second)) if index % 2 else (str(second), str(first))
                left, right = (rng.choice(drawn[name]) for name in names)
                item = pair_item(split, LEFT_QUESTION, left, right, names[0], rng)
                yield Item(split, item.question, item.answer, item.media, f"{first} | {second}")

    def _move_items(self) -> Iterator[Item]:
        yield from move_items(
            self._digits, self._sizes["vid_dir"], generator(self._seed, "vid_dir")
        )


def label(drawing: Drawing) -> str:
    """The digit that a drawing of ``read_digits`` shows."""
    return drawing.name.split()[0]


def read_digits() -> list[Drawing]:
    """All digits, dark on transparent; the name is ``<digit> <number of the drawing>``."""
    from sklearn.datasets import load_digits  # takes seconds to import, and only this needs it

    table = load_digits()
    drawings = []
    for index, (pixels, digit) in enumerate(zip(table.images, table.target, strict=True)):
        ink = Image.fromarray(np.rint(pixels * (255 / 16)).astype(np.uint8))
        image = Image.new("RGBA", (SIDE, SIDE), (20, 20, 60, 255))
        image.putalpha(ink.resize((SIDE, SIDE), Image.Resampling.BICUBIC))
        drawings.append(Drawing(f"{int(digit)} {index}", image))
    return drawings
