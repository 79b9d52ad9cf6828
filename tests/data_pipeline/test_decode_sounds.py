"""Recordings: what is read, by which library, and what comes out."""

import io

import av
import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.reading.decode import (
    BrokenMediumError,
    DecodeLimits,
    decode_sound,
    probe_sound,
    sound_duration_ms,
)
from data_pipeline.reading.medium import Medium
from data_pipeline.shards.probe import media_length
from tests.media import medium, sound


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


def _by_ffmpeg(form: str, codec: str, rate: int, samples: np.ndarray, channels: int) -> Medium:
    """A recording whose channels are all ``samples``, as FFmpeg writes it."""
    file = io.BytesIO()
    with av.open(file, "w", format=form) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.layout = layout = {1: "mono", 2: "stereo"}[channels]
        block = np.tile(samples.astype(np.float32), (channels, 1))
        frame = av.AudioFrame.from_ndarray(block, format="fltp", layout=layout)
        frame.sample_rate, frame.pts = rate, 0
        size = stream.codec_context.frame_size or 1024
        cutter = av.AudioResampler(stream.format, layout, rate, size)
        for piece in (*cutter.resample(frame), *cutter.resample(None)):
            container.mux(stream.encode(piece))
        container.mux(stream.encode())
    return medium("speech", file.getvalue())


def _similarity(one: np.ndarray, other: np.ndarray) -> float:
    length = min(len(one), len(other))
    return float(np.corrcoef(one[:length], other[:length])[0, 1])


@pytest.mark.parametrize(
    ("form", "codec", "rate", "slack_ms"),
    [
        ("mp4", "aac", 16_000, 0),
        ("mov", "pcm_s16be", 22_050, 0),
        ("matroska", "aac", 44_100, 80),
        ("webm", "libopus", 48_000, 10),
        ("ogg", "libopus", 48_000, 0),
        ("wav", "adpcm_yamaha", 16_000, 130),
    ],
)
@pytest.mark.parametrize("channels", [1, 2])
def test_what_libsndfile_does_not_read_is_ffmpegs(form, codec, rate, slack_ms, channels):
    time = np.arange(int(2.7183 * rate)) / rate
    sweep = 0.4 * np.sin(2 * np.pi * (200 + 150 * time) * time)
    recording = _by_ffmpeg(form, codec, rate, sweep, channels)
    facts = probe_sound(recording)
    assert (facts.rate, facts.channels) == (rate, channels)
    assert 0 <= facts.duration_ms - sound_duration_ms(len(time), rate) <= slack_ms
    samples = decode_sound(recording, 30, rate)
    assert len(samples) == facts.samples
    assert _similarity(samples, sweep) > 0.99
    assert np.array_equal(decode_sound(recording, 0.5, rate), samples[: rate // 2])
    assert media_length("speech", recording.data) == (facts.duration_ms, 0)


@pytest.mark.parametrize("rate", [16_000, 48_000])
def test_both_libraries_hear_the_same_opus(rate):
    noise = np.random.default_rng(0).normal(0, 0.1, (2 * rate + 77, 2)).astype(np.float32)
    smooth = np.apply_along_axis(np.convolve, 0, noise, np.ones(16) / 4, "same")
    recording = sound(smooth, rate, form="OGG", subtype="OPUS")
    theirs, own = soundfile.read(io.BytesIO(recording.data), dtype="float32", always_2d=True)
    assert probe_sound(recording).rate == 48_000
    assert probe_sound(recording).duration_ms == sound_duration_ms(len(theirs), own)
    ours = decode_sound(recording, 30, own)
    assert len(ours) == len(theirs)
    assert _similarity(ours, theirs.mean(axis=1)) > 0.999


def test_a_damaged_recording_is_not_given_to_a_decoder_that_conceals():
    flac = bytearray(sound(40_000, form="FLAC").data)
    flac[len(flac) // 2] ^= 0x5A
    with pytest.raises(BrokenMediumError, match="flac decoder"):
        decode_sound(medium("speech", bytes(flac)), 30)


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
        assert media_length("speech", recording.data) == (probe_sound(recording).duration_ms, 0)
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
        assert media_length("speech", recording.data) == (0, 0)
        with pytest.raises(BrokenMediumError):
            probe_sound(recording)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 10**9), st.sampled_from([8000, 11025, 16000, 44100, 48000]))
def test_duration_is_within_half_a_millisecond(samples, rate):
    assert abs(sound_duration_ms(samples, rate) / 1000 - samples / rate) <= 0.0005 + 1e-9
