"""Decoding in a process of its own: the same bits, and no harm beyond it."""

from __future__ import annotations

import io
import time

import numpy as np
import pytest
from PIL import Image

from data_pipeline.reading.apart import decode_apart
from data_pipeline.reading.limits import LARGE, BrokenMediumError, DecodeLimits
from data_pipeline.reading.medium import Medium
from data_pipeline.reading.prepare import prepare
from tests.media import clip, picture, sound
from unimoe_mcore.config.towers import EncoderConfig

ENCODER = EncoderConfig(resolution=32, frames=4, max_seconds=2.0)


def test_the_same_bits_as_here():
    flac = sound(np.zeros(44_100 * 3, np.float32) + 0.25, rate=44_100, form="FLAC")
    media = [picture(form="WEBP"), flac, clip(), picture(seed=1)]
    found = decode_apart([(medium, ENCODER) for medium in media])
    for medium, decoded in zip(media, found, strict=True):
        assert np.array_equal(decoded.content, prepare(medium, ENCODER))
        assert decoded.content.dtype == prepare(medium, ENCODER).dtype
    assert [decoded.duration_ms for decoded in found] == [0, 3000, 0, 0]
    assert decode_apart([]) == []


def test_the_medium_at_fault_is_named():
    bad = Medium("image", b"no picture", "bad.png")
    with pytest.raises(BrokenMediumError) as caught:
        decode_apart([(picture(name="good"), ENCODER), (bad, ENCODER), (sound(), ENCODER)])
    assert caught.value.source == "bad.png"
    with pytest.raises(BrokenMediumError) as caught:
        decode_apart([(sound(), ENCODER)], DecodeLimits(max_bytes=10))
    assert caught.value.kind == LARGE


@pytest.mark.parametrize(
    ("does", "words"),
    [
        ("__import__('time').sleep(60)", "decoding it took longer than 1 s"),
        ("__import__('os').abort()", "SIGABRT"),
        ("bytearray(2**33)", "MemoryError"),
    ],
)
def test_harm_stays_in_the_process(monkeypatch, tmp_path, does, words):
    """A decoder that hangs, crashes, or asks for all memory, at the second of two media."""
    (tmp_path / "sitecustomize.py").write_text(
        "import data_pipeline.reading.pictures as p\n"
        "decode = p.blame\n"
        "import data_pipeline.modalities.image as q\n"
        "first = q.decode_image\n"
        "def harmful(medium, *rest):\n"
        "    if medium.source != 'bad': return first(medium, *rest)\n"
        f"    with p.blame(medium, 'picture', 10**9): {does}\n"
        "q.decode_image = harmful\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    bad = Medium("image", picture().data, "bad")
    began = time.monotonic()
    with pytest.raises(BrokenMediumError, match=words) as caught:
        decode_apart([(picture(), ENCODER), (bad, ENCODER)], seconds=1.0)
    assert caught.value.source == "bad"
    assert time.monotonic() - began < 20


def test_all_files_have_a_time_together():
    with pytest.raises(BrokenMediumError, match=r"all files took longer than 0\.1 s") as caught:
        decode_apart([(picture(), ENCODER)] * 3, together=0.1)
    assert caught.value.kind == LARGE


def test_what_moves():
    """Phones put previews and further shots behind a JPEG; it is a still picture with them."""
    frames = [Image.new("RGB", (64, 48), colour) for colour in ("red", "blue")]
    media = []
    for form in ("MPO", "GIF", "WEBP"):
        file = io.BytesIO()
        frames[0].save(file, form, save_all=True, append_images=frames[1:])
        media.append((Medium("image", file.getvalue(), form), ENCODER))
    found = decode_apart(media)
    assert [decoded.moves for decoded in found] == [False, True, True]
    red, _, blue = found[0].content.reshape(-1, 3).mean(0)
    assert red > 200 > 50 > blue
