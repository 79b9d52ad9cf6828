"""Puzzles with small drawings on a canvas: counting, left and right, movement; JPEG and MP4.

The drawings come from elsewhere (emoji, handwritten digits); a drawing is an RGBA image with a
transparent background.
"""

from __future__ import annotations

import io
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np
from av.codec.context import Flags
from PIL import Image

from data_pipeline.importers.item import Item, MediaFile

CANVAS = 160
"""Side of the counting and movement canvases, pixels."""
FRAMES, FRAMES_PER_SECOND = 8, 8
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
COUNT_QUESTION = "How many objects are in the picture?"
MOVE_QUESTION = "Which way does the object move?"
MAX_COUNT = 6

_CELL, _COUNT_SIDE, _MOVE_SIDE = 52, 46, 56


@dataclass(frozen=True)
class Drawing:
    """A named picture with a transparent background.

    Attributes:
        name: what it is called.
        image: RGBA.
    """

    name: str
    image: Image.Image

    def scaled(self, side: int) -> Image.Image:
        """The picture in a square of ``side`` pixels."""
        return self.image.resize((side, side), Image.Resampling.BICUBIC)


def jpeg(image: Image.Image) -> MediaFile:
    """A picture as JPEG, quality 92."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, format="JPEG", quality=92)
    return MediaFile("image", "jpg", buffer.getvalue())


def mp4(frames: Sequence[Image.Image]) -> MediaFile:
    """Frames as an H.264 clip of ``FRAMES_PER_SECOND``; the same bytes on every call.

    One thread, no assembly (on some processors it reads what nobody wrote) and "bitexact" (no
    time of creation, no version of the muxer) make them so.
    """
    buffer = io.BytesIO()
    with av.open(buffer, mode="w", format="mp4", options={"fflags": "+bitexact"}) as container:
        options = {"crf": "18", "preset": "veryfast", "bf": "0", "x264-params": "threads=1:asm=0"}
        stream = container.add_stream("libx264", rate=FRAMES_PER_SECOND, options=options)
        stream.width, stream.height = frames[0].size
        stream.pix_fmt = "yuv420p"
        stream.time_base = Fraction(1, FRAMES_PER_SECOND)
        stream.codec_context.thread_count = 1
        stream.codec_context.flags |= Flags.bitexact
        for index, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.asarray(image.convert("RGB")), format="rgb24")
            frame.pts = index
            frame.time_base = stream.time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return MediaFile("video", "mp4", buffer.getvalue())


def canvas(rng: random.Random, width: int, height: int) -> Image.Image:
    """A light, plain background of a random tint."""
    tint = tuple(rng.randint(225, 255) for _ in range(3))
    return Image.new("RGBA", (width, height), (*tint, 255))


def count_items(
    drawings: Mapping[str, Sequence[Drawing]], sizes: Mapping[str, int], rng: random.Random
) -> Iterator[Item]:
    """1 to ``MAX_COUNT`` copies of a drawing on a grid of nine cells; how many?

    Args:
        drawings: split -> the drawings that it may use.
        sizes: split -> number of items.
        rng: where choices come from.
    """
    for split, size in sizes.items():
        for _ in range(size):
            drawing = rng.choice(drawings[split])
            number = rng.randint(1, MAX_COUNT)
            picture = canvas(rng, CANVAS, CANVAS)
            small = drawing.scaled(_COUNT_SIDE)
            for cell in rng.sample(range(9), number):
                left = cell % 3 * _CELL + rng.randint(0, 6)
                top = cell // 3 * _CELL + rng.randint(0, 6)
                picture.alpha_composite(small, (left, top))
            yield Item(split, COUNT_QUESTION, str(number), (jpeg(picture),), drawing.name)


def pair_item(
    split: str, question: str, left: Drawing, right: Drawing, answer: str, rng: random.Random
) -> Item:
    """Two drawings side by side, 288x144 pixels; which one is on the left?

    The item's source names the unordered pair.
    """
    picture = canvas(rng, 288, 144)
    for drawing, start in ((left, 0), (right, 144)):
        image = drawing.image
        picture.alpha_composite(
            image, (start + (144 - image.width) // 2, (144 - image.height) // 2)
        )
    source = " | ".join(sorted((left.name, right.name)))
    return Item(split, question, answer, (jpeg(picture),), source)


def move_items(
    drawings: Mapping[str, Sequence[Drawing]], sizes: Mapping[str, int], rng: random.Random
) -> Iterator[Item]:
    """A drawing that moves in a straight line for one second; which way?

    Args:
        drawings: split -> the drawings that it may use.
        sizes: split -> number of items.
        rng: where choices come from.
    """
    middle = (CANVAS - _MOVE_SIDE) // 2
    for split, size in sizes.items():
        for _ in range(size):
            drawing = rng.choice(drawings[split])
            direction = rng.choice(sorted(DIRECTIONS))
            across, down = DIRECTIONS[direction]
            background = canvas(rng, CANVAS, CANVAS)
            small = drawing.scaled(_MOVE_SIDE)
            step = rng.randint(8, 12)
            frames = []
            for time in range(FRAMES):
                shift = step * (time - (FRAMES - 1) / 2)
                frame = background.copy()
                frame.alpha_composite(
                    small, (middle + round(across * shift), middle + round(down * shift))
                )
                frames.append(frame)
            yield Item(split, MOVE_QUESTION, direction, (mp4(frames),), drawing.name)
