"""Noto's drawn emoji (Debian ``fonts-noto-color-emoji``) with Unicode's names and groups.

Only emoji of one code point are used: sequences are variants of these (skin, hair, gender), which
would make a held-out picture nearly equal to a training picture, and drawing them depends on
whether a text-shaping library is installed.

Held out: an emoji belongs to one split in every task; ``img_left`` shows training emoji in pairs
that no other split has.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from data_pipeline.errors import DataError
from data_pipeline.importers.item import Item, Task, generator, three_way
from data_pipeline.importers.packages import PackageStore
from data_pipeline.importers.pictures import (
    Drawing,
    canvas,
    count_items,
    jpeg,
    move_items,
    pair_item,
)

PACKAGES = ("unicode-data", "fonts-noto-color-emoji")
GROUP_QUESTION = "Which kind of thing is this picture?"
LEFT_QUESTION = "What is on the left?"

_SIZES = {
    "img_count": {"train": 800, "val": 100, "test": 200},
    "vid_dir": {"train": 400, "val": 60, "test": 140},
}
_SMALL_SIZES = {
    "img_count": {"train": 24, "val": 6, "test": 6},
    "vid_dir": {"train": 12, "val": 4, "test": 4},
}
_FONT_SIZE = 109
"""The only size at which the font has pictures, 136x128 pixels."""
_LINE = re.compile(r"([0-9A-F ]+?) *; fully-qualified +# \S+ E[\d.]+ (.+)")
_SKIPPED_GROUPS = ("Flags",)


@dataclass(frozen=True)
class Emoji:
    """One emoji.

    Attributes:
        character: its one code point.
        name: Unicode's short name.
        group: first word of its group: Smileys, People, Animals, Food, Travel ...
    """

    character: str
    name: str
    group: str


class EmojiTasks:
    """The picture and video tasks over emoji.

    Args:
        store: where the packages come from.
        seed: seed of the splits and pictures.
        small: a few items per task.

    Raises:
        PackageError: a package cannot be fetched.
        DataError: a package does not hold what is expected.
    """

    def __init__(self, store: PackageStore, seed: int, small: bool):
        table, font = (store.get(name) for name in PACKAGES)
        self._seed = seed
        self._small = small
        self._font = _load_font(font / "usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
        listed = read_emoji(table / "usr/share/unicode/emoji/emoji-test.txt")
        drawn = [emoji for emoji in listed if self._font.getlength(emoji.character) <= 140]
        self.splits = split_emoji(drawn, seed, per_group=6 if small else None)
        self._drawings: dict[str, Drawing] = {}
        self.left_names = self._left_emoji()

    def tasks(self) -> list[Task]:
        """img_group, img_count, img_left and vid_dir."""
        sizes = _SMALL_SIZES if self._small else _SIZES
        groups = sum(len(emoji) for emoji in self.splits.values())
        pairs = sum(len(pairs) for pairs in self.pairs().values())
        return [
            Task("img_group", groups, self._group_items),
            Task("img_count", sum(sizes["img_count"].values()), self._count_items),
            Task("img_left", 2 * pairs, self._left_items),
            Task("vid_dir", sum(sizes["vid_dir"].values()), self._move_items),
        ]

    def pairs(self) -> dict[str, list[tuple[Emoji, Emoji]]]:
        """Unordered pairs of training emoji for each split; each is shown in both orders."""
        every = list(combinations(self.left_names, 2))
        divided = three_way(every, generator(self._seed, "img_left"), val=0.07, test=0.13)
        if not self._small:
            divided["train"] = divided["train"][:500]
        return divided

    def _left_emoji(self) -> list[Emoji]:
        """Training emoji with a name of one word, which a small model can spell."""
        known = [emoji for emoji in self.splits["train"] if re.fullmatch("[a-z]+", emoji.name)]
        return known[: 8 if self._small else 40]

    def _drawing(self, emoji: Emoji) -> Drawing:
        if emoji.character not in self._drawings:
            image = Image.new("RGBA", (136, 128), (0, 0, 0, 0))
            pen = ImageDraw.Draw(image)
            pen.text((0, 0), emoji.character, font=self._font, embedded_color=True)
            self._drawings[emoji.character] = Drawing(emoji.name, image)
        return self._drawings[emoji.character]

    def _all_drawings(self) -> dict[str, list[Drawing]]:
        return {
            split: [self._drawing(emoji) for emoji in members]
            for split, members in self.splits.items()
        }

    def _group_items(self) -> Iterator[Item]:
        rng = generator(self._seed, "img_group")
        for split, members in self.splits.items():
            for emoji in members:
                picture = canvas(rng, 144, 144)
                picture.alpha_composite(self._drawing(emoji).image, (4, 8))
                yield Item(split, GROUP_QUESTION, emoji.group, (jpeg(picture),), emoji.name)

    def _count_items(self) -> Iterator[Item]:
        sizes = (_SMALL_SIZES if self._small else _SIZES)["img_count"]
        yield from count_items(self._all_drawings(), sizes, generator(self._seed, "img_count"))

    def _left_items(self) -> Iterator[Item]:
        rng = generator(self._seed, "img_left pictures")
        for split, pairs in self.pairs().items():
            for first, second in pairs:
                for left, right in ((first, second), (second, first)):
                    yield pair_item(
                        split,
                        LEFT_QUESTION,
                        self._drawing(left),
                        self._drawing(right),
                        left.name,
                        rng,
                    )

    def _move_items(self) -> Iterator[Item]:
        sizes = (_SMALL_SIZES if self._small else _SIZES)["vid_dir"]
        yield from move_items(self._all_drawings(), sizes, generator(self._seed, "vid_dir"))


def read_emoji(table: Path) -> list[Emoji]:
    """Emoji of one code point (and a variation selector) from Unicode's ``emoji-test.txt``.

    Raises:
        DataError: the table is missing or holds no emoji.
    """
    found: list[Emoji] = []
    group = ""
    try:
        lines = table.read_text("utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise DataError(f"{table} cannot be read: {error}") from error
    for line in lines:
        if line.startswith("# group:"):
            group = line.partition(":")[2].strip()
        elif (match := _LINE.match(line)) and group not in _SKIPPED_GROUPS:
            text = "".join(chr(int(code, 16)) for code in match[1].split())
            character = text.replace("\ufe0f", "")
            if len(character) == 1:
                found.append(Emoji(character, match[2], group.split()[0]))
    if not found:
        raise DataError(f"{table} holds no emoji; remove the package from the cache and try again")
    return found


def split_emoji(emoji: list[Emoji], seed: int, per_group: int | None) -> dict[str, list[Emoji]]:
    """Divide each group 70/10/20 into train, val and test; the splits are in random order.

    Args:
        emoji: all emoji.
        seed: seed of the order.
        per_group: use so many of each group; ``None`` uses all.
    """
    rng = generator(seed, "emoji")
    splits: dict[str, list[Emoji]] = {"train": [], "val": [], "test": []}
    for group in sorted({each.group for each in emoji}):
        members = [each for each in emoji if each.group == group]
        rng.shuffle(members)
        for split, part in three_way(members[:per_group], rng, val=0.1, test=0.2).items():
            splits[split] += part
    for part in splits.values():
        rng.shuffle(part)
    return splits


def _load_font(path: Path) -> ImageFont.FreeTypeFont:
    try:
        # The basic layout draws single code points alike with and without libraqm.
        return ImageFont.truetype(path, _FONT_SIZE, layout_engine=ImageFont.Layout.BASIC)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from error
