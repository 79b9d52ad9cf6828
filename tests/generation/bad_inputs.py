"""Questions that cannot be asked: what somebody might well try, and what nobody should."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import soundfile
from PIL import Image

from tests.media import clip, picture, sound


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@cache
def png_of(width: int, height: int) -> bytes:
    """A PNG of one grey, compressed as tightly as can be, made without its pixels in memory."""
    packer = zlib.compressobj(1)
    row = bytes(width + 1)
    packed = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + _chunk(b"IHDR", header)
        + _chunk(b"IDAT", packed)
        + _chunk(b"IEND", b"")
    )


def huge_header() -> bytes:
    """A PNG that claims to be as large as its header can say, and holds nothing."""
    header = struct.pack(">IIBBBBB", 2**31 - 1, 2**31 - 1, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IEND", b"")


def animation() -> bytes:
    """A GIF of two frames."""
    file = io.BytesIO()
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue")]
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    return file.getvalue()


def video_without_frames() -> bytes:
    """A Matroska file with a picture stream in which nothing is."""
    import av

    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        container.start_encoding()
    return file.getvalue()


def video_of_sound() -> bytes:
    """An MP4 in which there is only sound."""
    import av

    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=16_000, layout="mono")
        frame = av.AudioFrame.from_ndarray(
            np.zeros((1, 1024), np.float32), format="fltp", layout="mono"
        )
        frame.sample_rate = 16_000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


@cache
def hours(number: int) -> bytes:
    """A FLAC of silence, at a low rate so that it is soon made."""
    return sound(np.zeros(number * 3600 * 1000, np.int16), rate=1000, form="FLAC").data


def not_a_number() -> bytes:
    """A WAV of floats that are no numbers."""
    file = io.BytesIO()
    wave = np.full(8000, np.nan, np.float32)
    soundfile.write(file, wave, 16_000, format="WAV", subtype="FLOAT")
    return file.getvalue()


FILES: dict[str, tuple[str, Callable[[], bytes], str]] = {
    "an empty file": ("image", lambda: b"", "the file is empty"),
    "text named .png": ("image", lambda: b"This is a picture of a cat.\n" * 9, "cannot decode"),
    "168 megapixels": ("image", lambda: png_of(14_000, 12_000), "14000 x 12000 pixels are more"),
    "a huge header": ("image", huge_header, "cannot be used"),
    "half a JPEG": ("image", lambda: picture(form="JPEG").data[:-400], "truncated"),
    "an animated GIF": ("image", animation, "is an animation"),
    "a sound as a picture": ("image", lambda: sound(800).data, "cannot decode this picture"),
    "a WAV without sound": ("audio", lambda: sound(0).data, "0 samples"),
    "half a WAV": ("speech", lambda: sound().data[:9000], "truncated"),
    "a WAV that is not a number": ("audio", not_a_number, "samples that are not sound"),
    "three hours": ("speech", lambda: hours(3), "lasts 180 minutes, at most 60"),
    "a picture as a sound": ("audio", lambda: picture().data, "cannot decode this recording"),
    "a video without frames": ("video", video_without_frames, "cannot be used"),
    "a video of sound": ("video", video_of_sound, "cannot be used"),
    "half a video": ("video", lambda: clip().data[:1500], "cannot be used"),
    "a picture as a video": ("video", lambda: picture().data, "cannot decode this video"),
}
"""What it is -> given as what, the file's bytes, and words of the refusal."""


def command_lines(folder: Path) -> dict[str, tuple[list[str], str]]:
    """What is typed after the run's name -> words of the refusal; files are made in a folder."""
    good, pipe = folder / "good.png", folder / "pipe"
    good.write_bytes(picture().data)
    os.mkfifo(pipe)
    big = folder / "big.wav"
    with big.open("wb") as file:
        file.truncate(2**28 + 1)
    image = ["--image", str(good)]
    return {
        "no question": (["  "], "The question is empty"),
        "a placeholder and nothing else": (["<image>", *image], "The question is empty"),
        "a placeholder without a file": (
            ["What is <image>?"],
            "has <image> once, but a file is given for it never",
        ),
        "a file without a placeholder": (
            ["<image> ?", *image, *image],
            "given as image twice, but the question has <image> once",
        ),
        "placeholders of another kind": (
            ["<video> ?", *image],
            "has <video> once, but a file is given for it never",
        ),
        "no such file": (["?", "--audio", str(folder / "no.wav")], "There is no file"),
        "a folder as a file": (["?", "--image", str(folder)], "is a folder"),
        "a pipe": (["?", "--speech", str(pipe)], "is no ordinary file"),
        "a file of a quarter GiB": (["?", "--audio", str(big)], "at most 256 are taken"),
        "many files": (["?", *image * 17], "17 files are given, at most 16"),
        "a long question": (["why " * 6000], "at most 20000 are taken"),
        "no room for the answer": (["?", "--max-tokens", "100000"], "the model has room for"),
        "no answer": (["?", "--max-tokens", "0"], "must be at least 1"),
        "not a number": (["?", "--max-tokens", "many"], "invalid int value"),
        "an unknown option": (["?", "--picture", str(good)], "unrecognized arguments"),
        "too hot": (["?", "--temperature", "1e9"], "not between 0 and 100"),
        "top-p of nothing": (["?", "--top-p", "0"], "above 0"),
        "no text": (["\udcff\udcfe"], "is not UTF-8 text"),
        "no process": (["?", "--processes", "0"], "must be at least 1"),
        "experts that cannot be divided": (["?", "--processes", "3"], "cannot be divided evenly"),
        "another checkpoint": (["?", "--checkpoint", "step-9"], "only step-4, step-2"),
        "an odd checkpoint": (["?", "--checkpoint", "../x"], "name newest, best, or step-N"),
    }
