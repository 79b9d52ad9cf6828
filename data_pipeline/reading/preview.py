"""Media made small, to be looked at or listened to.

All bytes are re-encoded: what a shard holds never gets into a page as it is.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
import soundfile
from PIL import Image

from data_pipeline.reading.decode import decode_image, decode_sound, decode_video
from data_pipeline.reading.medium import Medium

PICTURE, FRAME = 240, 120
"""Longer side of a picture, and of a frame of a clip, pixels."""
FRAMES = 4
SECONDS, RATE = 10.0, 16_000
"""Longest sound, and its sampling rate, Hz."""


@dataclass(frozen=True)
class Preview:
    """A medium to look at or listen to.

    Attributes:
        kind: ``picture`` or ``sound``.
        mime: its type, such as ``image/jpeg``.
        ending: of a file's name.
        data: the file's bytes.
        words: what it is.
    """

    kind: str
    mime: str
    ending: str
    data: bytes
    words: str


def preview_picture(medium: Medium) -> Preview:
    """A picture made small.

    Raises:
        BrokenMediumError: it cannot be decoded.
    """
    return of_pixels(decode_image(medium), "a picture")


def preview_clip(medium: Medium) -> Preview:
    """Some frames of a clip side by side.

    Raises:
        BrokenMediumError: it cannot be decoded.
    """
    frames = decode_video(medium, FRAMES, max_frames=1024)
    strip = np.concatenate([np.asarray(_shrunk(frame, FRAME)) for frame in frames], 1)
    return _jpeg(Image.fromarray(strip), f"{FRAMES} frames of the clip, in order")


def preview_sound(medium: Medium) -> Preview:
    """The beginning of a recording.

    Raises:
        BrokenMediumError: it cannot be decoded.
    """
    samples = decode_sound(medium, SECONDS, RATE)
    file = io.BytesIO()
    soundfile.write(file, np.clip(samples, -1, 1), RATE, format="MP3")
    words = f"{len(samples) / RATE:.1f} s of {medium.modality}"
    return Preview("sound", "audio/mpeg", "mp3", file.getvalue(), words)


def of_pixels(pixels: np.ndarray, words: str) -> Preview:
    """Pixels, uint8 ``[height, width, 3]`` or ``[height, width]``, as a small picture."""
    return _jpeg(_shrunk(pixels, PICTURE), words)


def _shrunk(pixels: np.ndarray, side: int) -> Image.Image:
    picture = Image.fromarray(pixels)
    picture.thumbnail((side, side))
    return picture


def _jpeg(picture: Image.Image, words: str) -> Preview:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=85)
    return Preview("picture", "image/jpeg", "jpg", file.getvalue(), words)
