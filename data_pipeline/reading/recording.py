"""An open recording: libsndfile, or FFmpeg for what libsndfile does not read or reads slowly.

Which library reads a file is settled when the file is opened, so that its length and its samples
come from the same one: Opus by FFmpeg, all else by libsndfile, and what one of them does not
open by the other (AAC in MP4, WebM, codecs in WAV that libsndfile lacks, ...). A file that opens
and then turns out damaged is not tried again: a decoder that conceals damage would return
another recording.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import av
import numpy as np
import soundfile
from av.audio.frame import AudioFrame
from av.audio.stream import AudioStream
from av.container import InputContainer

from data_pipeline.reading.lengths import shortfall
from data_pipeline.reading.limits import LARGE, BrokenMediumError, DecodeLimits
from data_pipeline.reading.medium import Medium

# FFmpeg's names. Playlists are left out: they open other files. So is MP3, which FFmpeg finds
# in anything; libsndfile reads it.
_CONTAINERS = "mov,mp4,matroska,webm,ogg,aac,wav,asf"
_SLACK_SECONDS = 0.1
"""Matroska counts the silence that a decoder drops at the start and rounds to packets."""

_BLOCK = 2**22
"""Numbers decoded at a time, 16 MiB; libsndfile seeks after every block, which is slow."""

_OPUS = b"OpusHead"
_OPUS_PLACE = 28  # bytes of an Ogg page's header before its one packet


def sound_duration_ms(samples: int, rate: int) -> int:
    """Length of a recording in milliseconds, rounded to the nearest, ties to even.

    Shard indexes store the same number, and encoders count features from it: a token too many or
    too few would not fit the place that the plan has made for it.

    Args:
        samples: samples per channel at the file's own rate.
        rate: the file's own sampling rate, Hz.
    """
    return round(1000 * samples / rate)


@dataclass(frozen=True)
class SoundFacts:
    """What a recording's header says.

    Attributes:
        samples: samples per channel.
        rate: sampling rate, Hz.
        channels: number of channels.
    """

    samples: int
    rate: int
    channels: int

    @property
    def duration_ms(self) -> int:
        """Length in milliseconds, see ``sound_duration_ms``."""
        return sound_duration_ms(self.samples, self.rate)


@dataclass(frozen=True)
class Recording:
    """An open recording.

    Attributes:
        facts: what its header says.
        blocks: from a number of samples to float32 ``[samples, channels]``, piece by piece, that
            are not more in all.
        slack: samples by which the header may promise more than there are.
    """

    facts: SoundFacts
    blocks: Callable[[int], Iterator[np.ndarray]]
    slack: int = 0


@contextmanager
def open_recording(medium: Medium, limits: DecodeLimits) -> Iterator[Recording]:
    """Open a recording with the library that is its type's first, else with the other one.

    Raises:
        BrokenMediumError: its header lies about its length, or it is outside ``limits``.
        Exception: whatever the first library says of a file that neither of them opens.
    """
    if problem := shortfall(medium.data):
        raise BrokenMediumError(medium.source, f"in the recording {problem}")
    opus = medium.data[_OPUS_PLACE : _OPUS_PLACE + len(_OPUS)] == _OPUS
    first, second = (_ffmpeg, _libsndfile) if opus else (_libsndfile, _ffmpeg)
    with ExitStack() as stack:
        try:
            recording = stack.enter_context(first(medium, limits))
        except BrokenMediumError:
            raise
        except Exception as error:
            try:
                recording = stack.enter_context(second(medium, limits))
            except BrokenMediumError:
                raise
            except Exception:
                raise error from None
        _refuse_outside(medium, recording.facts, limits)
        yield recording


def _refuse_outside(medium: Medium, facts: SoundFacts, limits: DecodeLimits) -> None:
    claim = f"the recording claims {facts.samples} samples at {facts.rate} Hz"
    if facts.samples < 1 or facts.rate < 1 or facts.channels < 1:
        raise BrokenMediumError(medium.source, claim)
    if facts.duration_ms > limits.max_duration_ms:
        raise BrokenMediumError(medium.source, claim, LARGE)
    if facts.rate > limits.max_rate or facts.channels > limits.max_channels:
        raise BrokenMediumError(
            medium.source,
            f"{facts.rate} Hz with {facts.channels} channels exceeds "
            f"{limits.max_rate} Hz with {limits.max_channels} channels",
            LARGE,
        )


@contextmanager
def _libsndfile(medium: Medium, limits: DecodeLimits) -> Iterator[Recording]:
    with soundfile.SoundFile(io.BytesIO(medium.data)) as file:

        def blocks(samples: int) -> Iterator[np.ndarray]:
            size = max(1, _BLOCK // file.channels)
            return file.blocks(size, frames=samples, dtype="float32", always_2d=True)

        yield Recording(SoundFacts(file.frames, file.samplerate, file.channels), blocks)


@contextmanager
def _ffmpeg(medium: Medium, limits: DecodeLimits) -> Iterator[Recording]:
    with _stream(medium) as (container, stream):
        rate, channels = stream.codec_context.sample_rate, stream.codec_context.channels
        seconds = _declared(container, stream)
        if seconds is None:
            with _stream(medium) as (again, listed):
                seconds = _counted(medium, again, listed, limits.max_packets)
        facts = SoundFacts(round(seconds * rate), rate, channels)

        def blocks(samples: int) -> Iterator[np.ndarray]:
            return _decoded(medium, container.decode(stream), facts, samples)

        yield Recording(facts, blocks, round(_SLACK_SECONDS * rate))


@contextmanager
def _stream(medium: Medium) -> Iterator[tuple[InputContainer, AudioStream]]:
    options = {"format_whitelist": _CONTAINERS, "protocol_whitelist": "none"}
    with av.open(io.BytesIO(medium.data), mode="r", options=options) as container:
        if not container.streams.audio:
            raise ValueError("the file holds no sound")
        stream = container.streams.audio[0]
        stream.codec_context.thread_count = 1
        yield container, stream


def _declared(container: InputContainer, stream: AudioStream) -> float | None:
    """The length in seconds that the container stores; None where FFmpeg would guess it."""
    name = container.format.name
    if "ogg" in name and stream.duration and stream.time_base:
        skipped = _pre_skip(stream.codec_context.extradata or b"")
        return float(stream.duration * stream.time_base) - skipped / 48_000
    if "mov" in name and stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    if "matroska" in name and container.duration:
        return container.duration / av.time_base
    return None


def _pre_skip(header: bytes) -> int:
    """Samples at 48 kHz that an Opus decoder drops at the start; the length counts them."""
    return int.from_bytes(header[10:12], "little") if header.startswith(_OPUS) else 0


def _counted(
    medium: Medium, container: InputContainer, stream: AudioStream, max_packets: int
) -> float:
    """The length in seconds as the sum over all packets, by demuxing only."""
    total = 0
    for number, packet in enumerate(container.demux(stream)):
        if number > max_packets:
            raise BrokenMediumError(
                medium.source, f"the recording has more than {max_packets} packets", LARGE
            )
        if packet.is_corrupt:
            raise BrokenMediumError(medium.source, "the recording is truncated")
        total += packet.duration or 0
    return float(total * stream.time_base) if stream.time_base else 0.0


def _decoded(
    medium: Medium, frames: Iterator[AudioFrame], facts: SoundFacts, samples: int
) -> Iterator[np.ndarray]:
    for frame in frames:
        if samples <= 0:
            return
        if (frame.sample_rate, frame.layout.nb_channels) != (facts.rate, facts.channels):
            raise BrokenMediumError(medium.source, "the recording changes its rate or channels")
        yield _floats(frame, facts.channels)[:samples]
        samples -= frame.samples


def _floats(frame: AudioFrame, channels: int) -> np.ndarray:
    """A frame's samples as float32 ``[samples, channels]``, full scale 1."""
    raw = frame.to_ndarray()
    block = raw.T if frame.format.is_planar else raw.reshape(-1, channels)
    if block.dtype == np.uint8:
        return (block.astype(np.float32) - 128) / 128
    if block.dtype.kind == "i":
        return block.astype(np.float32) / 2.0 ** (8 * block.itemsize - 1)
    return block.astype(np.float32, copy=False)
