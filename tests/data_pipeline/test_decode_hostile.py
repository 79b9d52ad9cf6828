"""Media that are cut off, lie about themselves or are bombs: refused, soon, in little memory."""

import io
import json
import pickle
import resource
import struct
import subprocess
import sys
import zlib

import av
import numpy as np
import pytest
from PIL import Image

from data_pipeline.reading.decode import (
    BROKEN,
    LARGE,
    BrokenMediumError,
    DecodeLimits,
    decode_image,
    decode_sound,
    decode_video,
    probe_sound,
    probe_video,
)
from tests.media import clip, medium, picture, sound

PNG = b"\x89PNG\r\n\x1a\n"


def _chunk(kind: bytes, body: bytes = b"") -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _png(width: int, height: int, *chunks: bytes) -> bytes:
    """An evenly black PNG, compressed row by row."""
    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(1 + 3 * width)) for _ in range(height))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = _chunk(b"IDAT", rows + packer.flush())
    return PNG + _chunk(b"IHDR", header) + b"".join(chunks) + pixels + _chunk(b"IEND")


def _jpeg(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (width, height)).save(file, "JPEG")
    return file.getvalue()


def _decoded(modality: str, data: bytes) -> np.ndarray:
    if modality == "image":
        return decode_image(medium(modality, data))
    if modality == "video":
        return decode_video(medium(modality, data), 4)
    return decode_sound(medium(modality, data), 30)


def _refusal(modality: str, data: bytes) -> BrokenMediumError:
    with pytest.raises(BrokenMediumError, match=r"^test\.tar:x: ") as caught:
        _decoded(modality, data)
    return caught.value


# --- cut off


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM"])
@pytest.mark.parametrize("part", [0.02, 0.5, 0.9])
def test_pictures_that_are_cut_off(form, part):
    data = picture(size=(320, 240), form=form).data
    assert _refusal("image", data[: int(len(data) * part)]).kind == BROKEN


@pytest.mark.parametrize(
    ("form", "subtype"),
    [
        ("WAV", None),
        ("WAV", "FLOAT"),
        ("FLAC", None),
        ("MP3", None),
        ("OGG", "VORBIS"),
        ("OGG", "OPUS"),
        ("AIFF", None),
        ("AU", None),
        ("CAF", None),
        ("W64", None),
        ("RF64", None),
    ],
)
@pytest.mark.parametrize("part", [0.003, 0.5, 0.95])
def test_recordings_that_are_cut_off(form, subtype, part):
    data = sound(48_000, form=form, subtype=subtype).data
    assert len(decode_sound(medium("speech", data), 30)) == 48_000
    assert _refusal("speech", data[: int(len(data) * part)]).kind == BROKEN


@pytest.mark.parametrize(
    ("form", "codec", "options"),
    [
        ("mp4", "libx264", {}),
        ("mp4", "libx264", {"movflags": "frag_keyframe+empty_moov"}),
        ("matroska", "libx264", {}),
        ("webm", "libvpx", {}),
        ("avi", "mpeg4", {}),
        ("flv", "flv1", {}),
    ],
)
@pytest.mark.parametrize("part", [0.01, 0.5, 0.95])
def test_videos_that_are_cut_off(form, codec, options, part):
    data = clip(40, form=form, codec=codec, options=options).data
    assert _refusal("video", data[: int(len(data) * part)]).kind == BROKEN


# --- lies


@pytest.mark.parametrize("claim", [0, 100, 60_000, 2**31 - 1, 2**32 - 2, 2**32 - 1])
@pytest.mark.parametrize("both", [False, True])
def test_a_wave_header_that_lies_about_its_length(claim, both):
    data = bytearray(sound(24_000).data)
    place = data.index(b"data") + 4
    data[place : place + 4] = struct.pack("<I", claim)
    if both:
        data[4:8] = struct.pack("<I", min(claim + 36, 2**32 - 1))
    error = _refusal("speech", bytes(data))
    assert error.kind == BROKEN
    assert "header" in error.reason
    with pytest.raises(BrokenMediumError):
        probe_sound(medium("speech", bytes(data)))


def test_a_wave_file_may_go_on_behind_its_sound():
    data = sound(24_000).data
    for more in (b"LIST\x04\0\0\0INFO", b"odd bytes at the end"):
        assert len(decode_sound(medium("speech", data + more), 30)) == 24_000


@pytest.mark.parametrize("flaw", ["version", "channels", "packets"])
def test_an_opus_file_that_the_decoder_rejects(flaw):
    data = bytearray(sound(24_000, form="OGG", subtype="OPUS").data)
    head = data.index(b"OpusHead")
    if flaw == "version":
        data[head + 8] = 0xF0
    elif flaw == "channels":
        data[head + 9] = 0
    else:
        last = data.rindex(b"OggS")
        body = data.index(b"OggS", data.index(b"OpusTags"))
        data[body + 80 : last] = bytes(last - body - 80)
    assert _refusal("speech", bytes(data)).kind == BROKEN


def test_a_flac_header_that_claims_years():
    data = bytearray(sound(24_000, form="FLAC").data)
    data[21] |= 0x0F  # the highest of 36 bits
    assert _refusal("speech", bytes(data)).kind == LARGE
    with pytest.raises(BrokenMediumError, match="claims"):
        probe_sound(medium("speech", bytes(data)))


def test_a_video_without_frames():
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        container.start_encoding()
    assert _refusal("video", file.getvalue()).kind == BROKEN


@pytest.mark.parametrize("modality", ["image", "speech", "video"])
@pytest.mark.parametrize("data", [b"", b"\0", b"This is a picture of a cat.\n" * 9, bytes(70_000)])
def test_files_of_another_kind(modality, data):
    assert _refusal(modality, data).kind == BROKEN


# --- limits


def test_each_limit_says_large():
    for limited in (
        lambda: decode_image(picture(), max_bytes=100),
        lambda: decode_image(picture(), max_pixels=100),
        lambda: decode_sound(sound(), 1, limits=DecodeLimits(max_bytes=100)),
        lambda: decode_sound(sound(), 1, limits=DecodeLimits(max_rate=8000)),
        lambda: decode_sound(sound(), 1, limits=DecodeLimits(max_channels=0)),
        lambda: probe_sound(sound(), DecodeLimits(max_duration_ms=999)),
        lambda: decode_video(clip(), 2, max_bytes=100),
        lambda: decode_video(clip(), 2, max_pixels=100),
        lambda: decode_video(clip(), 2, max_packets=5),
        lambda: decode_video(clip(), 2, max_frames=3),
        lambda: probe_video(clip(), DecodeLimits(max_bytes=100)),
    ):
        with pytest.raises(BrokenMediumError) as caught:
            limited()
        assert caught.value.kind == LARGE


def test_the_error_travels_between_processes():
    error = pickle.loads(pickle.dumps(_refusal("image", b"")))
    assert (error.source, error.reason, error.kind) == ("test.tar:x", "the file is empty", BROKEN)
    assert str(error).startswith("test.tar:x: the file is empty; ")


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_refused_pictures_leave_nothing_behind(form):
    data = bytearray(picture(size=(800, 600), form=form).data)
    data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)
    broken = medium("image", bytes(data[:-1000]))

    def resident() -> int:
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * resource.getpagesize()

    for round_ in range(100):
        if round_ == 20:
            before = resident()
        _refusal("image", broken.data)
    assert resident() - before < 30 * 2**20  # the pixels of 20 of them


def test_the_same_bytes_always_give_the_same_words():
    reasons = {_refusal("image", b"no picture").reason for _ in range(3)}
    assert len(reasons) == 1
    assert "0x" not in reasons.pop()


# --- memory and threads, seen from a fresh process

_FRESH = """
import json, os, resource, sys, zlib
from data_pipeline.reading.decode import *
from data_pipeline.reading.medium import Medium
from tests.media import clip, picture, sound
for warm in (lambda: decode_image(picture()), lambda: decode_sound(sound(), 1)):
    warm()
decode_video(clip(), 2)
modality, path = sys.argv[1:]
medium = Medium(modality, open(path, "rb").read(), path)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
kind, check = "", 0
try:
    if modality == "image":
        check = zlib.crc32(decode_image(medium))
    elif modality == "video":
        check = zlib.crc32(decode_video(medium, 4))
    else:
        check = zlib.crc32(decode_sound(medium, 30))
except BrokenMediumError as error:
    kind = error.kind
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(json.dumps([kind, grown / 1024, len(os.listdir("/proc/self/task")), check]))
"""


def _fresh(tmp_path, modality: str, data: bytes) -> tuple[str, float, int, int]:
    """Kind of the refusal, MiB that the process grew by, its threads, CRC-32 of the result."""
    path = tmp_path / "medium"
    path.write_bytes(data)
    result = subprocess.run(
        [sys.executable, "-c", _FRESH, modality, str(path)],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return tuple(json.loads(result.stdout))


def _gif(width: int, height: int) -> bytes:
    screen = b"GIF89a" + struct.pack("<HHBBB", width, height, 0, 0, 0)
    frame = b"\x2c" + struct.pack("<HHHHB", 0, 0, width, height, 0)
    return screen + frame + b"\x02\x02\x4c\x01\0\x3b"


_BOMBS = {
    "168 megapixels, PNG": ("image", lambda: _png(14_000, 12_000)),
    "168 megapixels, JPEG": ("image", lambda: _jpeg(14_000, 12_000)),
    "4 gigapixels, GIF": ("image", lambda: _gif(65_535, 65_535)),
    "4 gigapixels, PPM": ("image", lambda: b"P6 65000 65000 255\n" + bytes(100)),
    "256 MiB of text in a PNG": (
        "image",
        lambda: _png(10, 10, _chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**28)))),
    ),
    "frames of 18 megapixels": (
        "video",
        lambda: clip(2, size=(6000, 3000), options={"preset": "ultrafast"}).data,
    ),
}


@pytest.mark.parametrize("name", _BOMBS)
def test_bombs_cost_little_memory(tmp_path, name):
    modality, make = _BOMBS[name]
    kind, grown, _, _ = _fresh(tmp_path, modality, make())
    assert kind == (BROKEN if "text" in name else LARGE)
    assert grown < 64


def test_hours_of_sound_cost_what_is_wanted_of_them(tmp_path):
    hours = sound(np.zeros(5 * 3600 * 16_000, np.int16), form="FLAC").data
    kind, grown, _, _ = _fresh(tmp_path, "speech", hours)
    assert kind == ""
    assert grown < 64  # whole, it would be 1.1 GiB


@pytest.mark.parametrize(
    ("modality", "data"),
    [
        ("image", picture(size=(1500, 1000), form="JPEG").data),
        ("image", picture(size=(1500, 1000), form="WEBP").data),
        ("speech", sound(160_000, form="OGG", subtype="OPUS").data),
        ("video", clip(50, size=(640, 480)).data),
    ],
    ids=["JPEG", "WebP", "Opus", "H.264"],
)
def test_one_thread_and_the_same_bits_everywhere(tmp_path, modality, data):
    kind, _, threads, check = _fresh(tmp_path, modality, data)
    assert (kind, threads, check) == ("", 1, zlib.crc32(_decoded(modality, data)))
