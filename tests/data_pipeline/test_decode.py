import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, ImageOps

from data_pipeline.reading.decode import (
    LARGE,
    BrokenMediumError,
    DecodeLimits,
    decode_image,
    decode_sound,
    decode_video,
    probe_video,
)
from data_pipeline.shards.probe import media_length
from tests.media import clip, medium, picture, sound


def _saved(image: Image.Image, form: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


# --- pictures


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "PPM"])
def test_picture_formats(form):
    pixels = decode_image(picture(size=(48, 40), form=form))
    assert pixels.shape == (40, 48, 3)
    assert pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - decode_image(picture(size=(48, 40)))).mean() < 12


def test_transparent_parts_are_white():
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (255, 0, 0, 255))
    pixels = decode_image(medium("image", _saved(image)))
    assert pixels.tolist() == [[[255, 255, 255], [255, 0, 0]]]


def test_sixteen_bit_grey_keeps_its_range():
    grey = np.array([[0, 32768, 65535]], np.uint16)
    pixels = decode_image(medium("image", _saved(Image.fromarray(grey))))
    assert pixels[0, :, 0].tolist() == [0, 128, 255]


def test_picture_is_turned_upright():
    image = Image.new("RGB", (3, 1), "blue")
    exif = image.getexif()
    exif[0x0112] = 6  # the camera was held on its side
    assert decode_image(medium("image", _saved(image, "JPEG", exif=exif))).shape == (3, 1, 3)


PNG = b"\x89PNG\r\n\x1a\n"


def _chunk(kind: bytes, body: bytes = b"") -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims ``width x height`` pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(b"\0" * 10_000)
    return PNG + _chunk(b"IHDR", header) + _chunk(b"IDAT", data) + _chunk(b"IEND")


@pytest.mark.parametrize("size", [(9_000, 9_000), (60_000, 60_000), (2**31 - 1, 2**31 - 1)])
def test_decompression_bomb_is_refused_by_its_header(size):
    with pytest.raises(BrokenMediumError, match=r"test\.tar:bomb") as caught:
        decode_image(medium("image", _bomb(*size), "bomb"))
    assert caught.value.kind == LARGE


def test_pixel_bound_is_exact():
    assert decode_image(picture(size=(20, 10)), max_pixels=200).shape == (10, 20, 3)
    with pytest.raises(BrokenMediumError, match="20 x 10"):
        decode_image(picture(size=(20, 10)), max_pixels=199)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 100,
        picture(size=(200, 200), form="JPEG").data[:-400],
        picture(size=(200, 200)).data[:300],
        _bomb(300, 300),  # fewer rows than promised
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n",  # would start Ghostscript
    ],
    ids=["empty", "zeros", "half a JPEG", "half a PNG", "PNG without rows", "EPS"],
)
def test_broken_picture_names_itself(data):
    with pytest.raises(BrokenMediumError, match=r"^test\.tar:broken: ") as caught:
        decode_image(medium("image", data, "broken"))
    assert caught.value.source == "test.tar:broken"


def _by_pillow(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


def _adam7(pixels: np.ndarray) -> bytes:
    """An interlaced PNG, which Pillow cannot write."""
    height, width, _ = pixels.shape
    passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2)]
    rows = b""
    for x, y, across, down in [*passes, (0, 1, 1, 2)]:
        for row in pixels[y::down, x::across]:
            rows += b"\0" + row.tobytes() if row.size else b""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 1)
    return PNG + _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(rows)) + _chunk(b"IEND")


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["JPEG", "grey JPEG", "PNG", "interlaced PNG", "WEBP"]),
    st.tuples(st.integers(1, 70), st.integers(1, 70)),
    st.integers(1, 8),
    st.sampled_from([20, 75, 100]),
    st.sampled_from([0, 1, 2]),
    st.booleans(),
)
def test_the_direct_way_gives_pillows_bits(form, size, orientation, quality, subsampling, flag):
    rng = np.random.default_rng(quality)
    coarse = rng.integers(0, 256, (7, 7, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
    exif = image.getexif()
    exif[0x0112] = orientation
    if form == "PNG":
        data = _saved(image, form, compress_level=quality // 12, optimize=flag)
    elif form == "interlaced PNG":
        data = _adam7(np.asarray(image))
    elif form == "WEBP":
        data = _saved(image, form, quality=quality, lossless=flag, exif=exif)
    else:
        image = image.convert("L") if form == "grey JPEG" else image
        options = {"quality": quality, "subsampling": subsampling, "progressive": flag}
        data = _saved(image, "JPEG", exif=exif, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(ImageFile.ImageFile, "load")  # Pillow's way is closed
        pixels = decode_image(medium("image", data))
    assert np.array_equal(pixels, _by_pillow(data))


def test_what_the_direct_way_refuses_is_pillows():
    jpeg = picture(form="JPEG").data
    littered = jpeg[:-2] + b"\0" * 40 + jpeg[-2:]  # libjpeg-turbo warns of the litter
    png = picture().data
    trailing = png[:-4] + b"none"  # the checksum of the end mark
    turned = _saved(Image.open(io.BytesIO(png)), exif=_exif(6))
    for data in (littered, trailing, turned, _saved(Image.open(io.BytesIO(png)).convert("P"))):
        assert np.array_equal(decode_image(medium("image", data)), _by_pillow(data))


def _exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG"])
def test_the_first_frame_of_a_picture_that_moves(form):
    frames = [Image.new("RGB", (20, 10), colour) for colour in ("red", "blue", "green")]
    data = _saved(frames[0], form, save_all=True, append_images=frames[1:], lossless=True)
    assert decode_image(medium("image", data)).reshape(-1, 3).tolist() == [[255, 0, 0]] * 200


# --- videos


def _expected(frames: int, wanted: int) -> np.ndarray:
    return np.array([(2 * i + 1) * frames // (2 * wanted) * 4 % 256 for i in range(wanted)])


@pytest.mark.parametrize(
    ("form", "codec"),
    [
        ("mp4", "libx264"),
        ("mp4", "mpeg4"),
        ("matroska", "libx264"),
        ("webm", "libvpx"),
        ("avi", "mpeg4"),
        ("mpegts", "libx264"),
        ("mpeg", "mpeg2video"),
    ],
)
@pytest.mark.parametrize(("frames", "wanted"), [(1, 3), (5, 8), (16, 1), (40, 8)])
def test_frames_are_evenly_spaced(form, codec, frames, wanted):
    pixels = decode_video(clip(frames, form=form, codec=codec), wanted)
    assert pixels.shape == (wanted, 48, 64, 3)
    assert np.abs(pixels.astype(int).mean(axis=(1, 2, 3)) - _expected(frames, wanted)).max() < 4


def test_seeking_gives_the_frames_that_decoding_everything_gives():
    long = clip(600, size=(32, 32), options={})
    middles = decode_video(long, 3).astype(int).mean(axis=(1, 2, 3))
    assert np.abs(middles - _expected(600, 3)).max() < 4
    # Entered at key frames (one per 250), the three frames cost fewer than all up to the last.
    assert decode_video(long, 3, max_frames=301).shape[0] == 3
    with pytest.raises(BrokenMediumError, match="more than 100 frames"):
        decode_video(long, 3, max_frames=100)
    # No index to seek in: everything up to the last wanted frame counts.
    with pytest.raises(BrokenMediumError, match="more than 301 frames"):
        decode_video(clip(600, (32, 32), form="mpegts"), 3, max_frames=301)


def test_video_bounds():
    with pytest.raises(BrokenMediumError, match="64 x 48"):
        decode_video(clip(), 2, max_pixels=64 * 48 - 1)
    with pytest.raises(BrokenMediumError, match="more than 15 frames"):
        decode_video(clip(16), 2, max_packets=15)


@pytest.mark.parametrize(
    ("form", "codec"), [("mp4", "libx264"), ("matroska", "libx264"), ("mpegts", "libx264")]
)
def test_the_index_and_the_decoder_agree_on_a_video(form, codec):
    video = clip(25, form=form, codec=codec)
    facts = probe_video(video)
    assert media_length("video", video.data) == (facts.duration_ms, facts.frames)
    assert facts.frames == 25
    assert facts.duration_ms == pytest.approx(2500, abs=100)
    with pytest.raises(BrokenMediumError, match="more than 24 frames"):
        probe_video(video, DecodeLimits(max_packets=24))
    with pytest.raises(BrokenMediumError, match="64 x 48"):
        probe_video(video, DecodeLimits(max_frame_pixels=64 * 48 - 1))
    assert probe_video(video, DecodeLimits(max_duration_ms=1000)).duration_ms == 0


PLAYLIST = b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 4096,
        clip(60).data[:1500],  # the index of an MP4 lies at its end
        clip(60, options={"movflags": "frag_keyframe+empty_moov"}).data[:-700],
        PLAYLIST,
        sound().data,
        picture().data,
    ],
    ids=["empty", "zeros", "half an MP4", "half a fragmented MP4", "playlist", "sound", "picture"],
)
def test_broken_video_names_itself(data):
    with pytest.raises(BrokenMediumError, match=r"^test\.tar:broken: "):
        decode_video(medium("video", data, "broken"), 4)
    assert media_length("video", data) == (0, 0)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["image", "speech", "video"]),
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=6),
)
def test_flipped_bytes_decode_or_name_the_medium(kind, flips):
    base = {"image": picture(form="JPEG"), "speech": sound(2000, form="FLAC"), "video": clip(6)}
    data = bytearray(base[kind].data)
    for place, value in flips:
        data[int(place * (len(data) - 1))] = value
    hostile = medium(kind, bytes(data), "flipped")
    blamed = hostile.source
    try:
        if kind == "image":
            assert decode_image(hostile).shape[2] == 3
        elif kind == "speech":
            assert np.isfinite(decode_sound(hostile, 2)).all()
        else:
            assert decode_video(hostile, 2).shape[0] == 2
    except BrokenMediumError as error:
        blamed = error.source
    assert blamed == "test.tar:flipped"
