import io
import struct
import zlib

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_pipeline.reading.decode import (
    BrokenMediumError,
    DecodeLimits,
    decode_image,
    decode_sound,
    decode_video,
    probe_sound,
    probe_video,
    sound_duration_ms,
)
from data_pipeline.shards.probe import sound_duration_ms as index_duration_ms
from data_pipeline.shards.probe import video_length
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


def _bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims ``width x height`` pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(b"\0" * 10_000)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("size", [(9_000, 9_000), (60_000, 60_000), (2**31 - 1, 2**31 - 1)])
def test_decompression_bomb_is_refused_by_its_header(size):
    with pytest.raises(BrokenMediumError, match=r"test\.tar:bomb"):
        decode_image(medium("image", _bomb(*size), "bomb"))


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


# --- recordings


@pytest.mark.parametrize("form", ["WAV", "FLAC", "OGG", "MP3"])
def test_sound_formats_keep_length_and_content(form):
    tone = np.sin(np.arange(16_000) * 2 * np.pi * 440 / 16_000).astype(np.float32) * 0.5
    recording = sound(tone, form=form)
    samples = decode_sound(recording, max_seconds=30)
    assert samples.dtype == np.float32
    assert probe_sound(recording).duration_ms == sound_duration_ms(len(samples), 16_000)
    assert len(samples) == pytest.approx(16_000, abs=2400)  # MP3 pads
    assert np.abs(np.fft.rfft(samples)).argmax() * 16_000 / len(samples) == pytest.approx(
        440, abs=2
    )


def test_channels_are_averaged():
    stereo = np.stack([np.full(800, 0.5), np.full(800, -0.25)], axis=1).astype(np.float32)
    samples = decode_sound(sound(stereo, subtype="FLOAT"), max_seconds=1)
    assert np.allclose(samples, 0.125)


def test_resampling_keeps_tones_and_removes_what_would_alias():
    time = np.arange(48_000) / 48_000
    audible = np.sin(2 * np.pi * 1000 * time).astype(np.float32)
    beyond = np.sin(2 * np.pi * 15_000 * time).astype(np.float32)  # would fold to 1 kHz
    kept = decode_sound(sound(audible, 48_000, subtype="FLOAT"), max_seconds=1)
    gone = decode_sound(sound(beyond, 48_000, subtype="FLOAT"), max_seconds=1)
    expected = np.sin(2 * np.pi * 1000 * np.arange(16_000) / 16_000)
    assert len(kept) == 16_000
    assert np.abs(kept - expected)[200:-200].max() < 1e-3
    assert np.abs(gone[200:-200]).max() < 1e-3


def test_only_the_wanted_stretch_is_decoded(monkeypatch):
    recording = sound(np.zeros(16_000 * 60, np.float32), form="FLAC")
    read = []
    original = soundfile.SoundFile.read

    def counting(self, frames=-1, *args, **kwargs):
        block = original(self, frames, *args, **kwargs)
        read.append(len(block))
        return block

    monkeypatch.setattr(soundfile.SoundFile, "read", counting)
    assert len(decode_sound(recording, max_seconds=1.5)) == 24_000
    assert sum(read) == 24_000


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
def test_samples_that_are_not_sound(value):
    samples = np.zeros(1600, np.float32)
    samples[7] = value
    with pytest.raises(BrokenMediumError, match="not sound"):
        decode_sound(sound(samples, subtype="FLOAT"), max_seconds=1)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"RIFF\xff\xff\xff\xffWAVEfmt ",
        sound(0).data,
        sound(20_000, form="FLAC").data[:9000],
        b"\0" * 5000,
    ],
    ids=["empty", "header only", "no samples", "half a FLAC", "zeros"],
)
def test_broken_sound_names_itself(data):
    with pytest.raises(BrokenMediumError, match=r"^test\.tar:broken: "):
        decode_sound(medium("speech", data, "broken"), max_seconds=30)


def test_sound_limits():
    with pytest.raises(BrokenMediumError, match="channels"):
        probe_sound(sound(np.zeros((10, 3), np.float32)), DecodeLimits(max_channels=2))
    with pytest.raises(BrokenMediumError, match="Hz"):
        decode_sound(sound(10, rate=48_000), 1, limits=DecodeLimits(max_rate=44_100))


def test_the_index_and_the_decoder_agree_on_a_length():
    # 8, 24 and 40 samples at 16 kHz are ties of 0.5, 1.5 and 2.5 ms.
    for samples, rate in ((8, 16_000), (24, 16_000), (40, 16_000), (4410, 22_050), (999, 44_100)):
        recording = sound(samples, rate)
        assert probe_sound(recording).duration_ms == index_duration_ms(recording.data)
    too_long = DecodeLimits(max_duration_ms=9)
    with pytest.raises(BrokenMediumError, match="claims 160 samples"):
        probe_sound(sound(160), too_long)


def test_the_index_knows_no_length_of_what_the_decoder_refuses():
    refused = [
        sound(0),
        sound(10, rate=400_000),
        sound(np.zeros((10, 33), np.float32)),
        medium("speech", b"nonsense"),
    ]
    for recording in refused:
        assert index_duration_ms(recording.data) == 0
        with pytest.raises(BrokenMediumError):
            probe_sound(recording)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 10**9), st.sampled_from([8000, 11025, 16000, 44100, 48000]))
def test_duration_is_within_half_a_millisecond(samples, rate):
    assert abs(sound_duration_ms(samples, rate) / 1000 - samples / rate) <= 0.0005 + 1e-9


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
    assert video_length(video.data) == (facts.duration_ms, facts.frames)
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
    assert video_length(data) == (0, 0)


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
