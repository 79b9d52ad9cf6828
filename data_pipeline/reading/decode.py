"""Bytes of a picture, recording or clip become pixels or samples, within bounds.

Every function takes untrusted bytes: sizes are looked at before anything is allocated, only the
containers named below are opened, and whatever goes wrong becomes a ``BrokenMediumError`` that
names the medium. One thread each: parallelism belongs to whoever calls.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import av
import numpy as np
import soundfile
import soxr
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from PIL import Image, ImageOps

from data_pipeline.errors import DataError
from data_pipeline.reading.medium import Medium


@dataclass(frozen=True)
class DecodeLimits:
    """What a single medium may cost.

    Attributes:
        max_pixels: most pixels of a picture.
        max_frame_pixels: most pixels of one frame of a video (5K fits).
        max_frames: most frames decoded from one video, kept or not.
        max_packets: most compressed frames that a video may list.
        max_channels: most channels of a recording.
        max_rate: highest sampling rate of a recording, Hz.
        max_duration_ms: longest recording or video that is believed, milliseconds; a longer
            claim is a broken header.
        max_amplitude: largest absolute sample; full scale is 1, so anything beyond is not sound.
    """

    max_pixels: int = 2**26
    max_frame_pixels: int = 2**24
    max_frames: int = 4096
    max_packets: int = 1_000_000
    max_channels: int = 32
    max_rate: int = 384_000
    max_duration_ms: int = 6 * 3600 * 1000
    max_amplitude: float = 1e6


LIMITS = DecodeLimits()

# Formats that hold pictures of data sets. Pillow knows many more; some start other programs.
_PICTURES = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM")
# FFmpeg's names. Playlists (HLS, concat, DASH) are left out: they open other files.
_CLIPS = "mov,mp4,matroska,webm,avi,mpegts,mpeg,flv,ogg"
# Containers with an index of key frames that a seek can rely on.
_SEEKABLE = ("mov", "matroska")


class BrokenMediumError(DataError):
    """A medium that cannot be decoded.

    Attributes:
        source: ``Medium.source`` of the medium.
    """

    def __init__(self, source: str, reason: str) -> None:
        super().__init__(f"{source}: {reason}; replace the file or leave the sample out")
        self.source = source


@contextmanager
def _blame(medium: Medium, what: str) -> Iterator[None]:
    """Turn whatever a decoder throws at broken bytes into a ``BrokenMediumError``."""
    try:
        yield
    except BrokenMediumError:
        raise
    # Decoders raise anything from OSError to struct.error and MemoryError on hostile bytes.
    except Exception as error:
        detail = " ".join(str(error).split())[:200] or type(error).__name__
        raise BrokenMediumError(medium.source, f"cannot decode this {what} ({detail})") from error


def decode_image(medium: Medium, max_pixels: int = LIMITS.max_pixels) -> np.ndarray:
    """Decode a picture as a viewer shows it: upright, transparent parts on white.

    Args:
        medium: a JPEG, PNG, WebP, GIF (first frame), BMP or PPM file.
        max_pixels: pictures with more pixels are refused before they are decompressed.

    Returns:
        uint8 ``[height, width, 3]``, RGB.

    Raises:
        BrokenMediumError: not a picture, truncated, or too large.
    """
    with (
        _blame(medium, "picture"),
        Image.open(io.BytesIO(medium.data), formats=_PICTURES) as image,
    ):
        _refuse_large(medium, *image.size, max_pixels)
        image.load()
        return np.asarray(_to_rgb(ImageOps.exif_transpose(image)))


def _refuse_large(medium: Medium, width: int, height: int, max_pixels: int) -> None:
    if width < 1 or height < 1 or width * height > max_pixels:
        raise BrokenMediumError(
            medium.source, f"{width} x {height} pixels are outside 1 to {max_pixels} pixels"
        )


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("floating-point pixels have no agreed range")
    if image.mode.startswith("I"):
        # Sixteen-bit grey: Pillow's own conversion clips everything above 255 to white.
        grey = np.clip(np.asarray(image).astype(np.int64) >> 8, 0, 255).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if image.has_transparency_data:
        layered = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), layered).convert("RGB")
    return image.convert("RGB")


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


def probe_sound(medium: Medium, limits: DecodeLimits = LIMITS) -> SoundFacts:
    """Read the length of a recording from its header, without decoding it.

    Raises:
        BrokenMediumError: not a recording, empty, or outside ``limits``.
    """
    with _blame(medium, "recording"), soundfile.SoundFile(io.BytesIO(medium.data)) as file:
        return _sound_facts(medium, file, limits)


def _sound_facts(medium: Medium, file: soundfile.SoundFile, limits: DecodeLimits) -> SoundFacts:
    facts = SoundFacts(samples=file.frames, rate=file.samplerate, channels=file.channels)
    if facts.samples < 1 or facts.rate < 1 or facts.duration_ms > limits.max_duration_ms:
        raise BrokenMediumError(
            medium.source, f"the recording claims {facts.samples} samples at {facts.rate} Hz"
        )
    if facts.rate > limits.max_rate or facts.channels > limits.max_channels:
        raise BrokenMediumError(
            medium.source,
            f"{facts.rate} Hz with {facts.channels} channels exceeds "
            f"{limits.max_rate} Hz with {limits.max_channels} channels",
        )
    return facts


def decode_sound(
    medium: Medium, max_seconds: float, rate: int = 16_000, limits: DecodeLimits = LIMITS
) -> np.ndarray:
    """Decode the first ``max_seconds`` of a recording; nothing behind them is decompressed.

    Channels are averaged. Another sampling rate is converted by libsoxr (band-limited, its
    high-quality preset).

    Args:
        medium: a file that libsndfile reads (WAV, FLAC, OGG, MP3, AIFF, ...).
        max_seconds: longest stretch returned, seconds.
        rate: sampling rate wanted, Hz.
        limits: bounds on rate, channels and amplitude.

    Returns:
        float32 ``[samples]``, full scale 1.

    Raises:
        BrokenMediumError: not a recording, truncated, empty, outside ``limits``, or not finite.
    """
    with _blame(medium, "recording"), soundfile.SoundFile(io.BytesIO(medium.data)) as file:
        facts = _sound_facts(medium, file, limits)
        wanted = min(facts.samples, math.ceil(max_seconds * facts.rate))
        # One second at a time, so that many channels never lie in memory at full length.
        blocks = file.blocks(
            blocksize=max(facts.rate, 1024), frames=wanted, dtype="float32", always_2d=True
        )
        mono = [block.mean(axis=1) for block in blocks]
        samples = np.concatenate(mono) if mono else np.zeros(0, np.float32)
        if len(samples) < wanted:
            raise BrokenMediumError(
                medium.source, f"the recording is truncated: {len(samples)} of {wanted} samples"
            )
        # NaN compares false, so this refuses it as well.
        if not np.abs(samples).max() <= limits.max_amplitude:
            raise BrokenMediumError(medium.source, "the recording holds samples that are not sound")
        if facts.rate != rate:
            samples = soxr.resample(samples, facts.rate, rate, quality="HQ")
        return np.ascontiguousarray(samples[: math.ceil(max_seconds * rate)], dtype=np.float32)


@dataclass(frozen=True)
class VideoFacts:
    """What a video's container says.

    Attributes:
        duration_ms: length in milliseconds, rounded; 0 if the container does not say, or says
            more than is believed.
        frames: compressed frames of the first picture stream.
    """

    duration_ms: int
    frames: int


def probe_video(medium: Medium, limits: DecodeLimits = LIMITS) -> VideoFacts:
    """Count a video's frames and read its length, without decoding it.

    Raises:
        BrokenMediumError: not a video, truncated, empty, or outside ``limits``.
    """
    with (
        _blame(medium, "video"),
        _open_video(medium, limits.max_frame_pixels) as (container, stream),
    ):
        frames = len(_timeline(medium, container, stream, limits.max_packets)[0])
        seconds = 0.0
        if stream.duration and stream.time_base:
            seconds = float(stream.duration * stream.time_base)
        elif container.duration:
            seconds = container.duration / av.time_base
        elif stream.average_rate:
            seconds = float(frames / stream.average_rate)
        duration_ms = round(1000 * seconds)
        believed = 0 <= duration_ms <= limits.max_duration_ms
        return VideoFacts(duration_ms if believed else 0, frames)


def decode_video(
    medium: Medium,
    frames: int,
    max_pixels: int = LIMITS.max_frame_pixels,
    max_frames: int = LIMITS.max_frames,
    max_packets: int = LIMITS.max_packets,
) -> np.ndarray:
    """Take evenly spaced frames from a video: the middle one of each of ``frames`` equal parts.

    A video of ``n`` frames gives frames ``floor((2 i + 1) n / (2 frames))``; one with fewer frames
    than wanted repeats some. Long videos are entered at the key frame before each wanted frame
    where their container has an index (MP4, Matroska), else decoded from the start.

    Args:
        medium: an MP4/MOV, Matroska/WebM, AVI, MPEG, FLV or OGG file.
        frames: frames wanted.
        max_pixels: most pixels of one frame.
        max_frames: most frames decoded on the way to the wanted ones.
        max_packets: most compressed frames in the file.

    Returns:
        uint8 ``[frames, height, width, 3]``, RGB, in the order of time, all of the first's size.

    Raises:
        BrokenMediumError: not a video, truncated, or outside the bounds.
    """
    with _blame(medium, "video"):
        with _open_video(medium, max_pixels) as (container, stream):
            times, keys = _timeline(medium, container, stream, max_packets)
        positions = [(2 * i + 1) * len(times) // (2 * frames) for i in range(frames)]
        wanted = [times[position] for position in positions]
        with _open_video(medium, max_pixels) as (container, stream):
            seekable = keys if any(name in container.format.name for name in _SEEKABLE) else []
            chosen = _frames_at(medium, container, stream, wanted, seekable, max_frames)
            width, height = chosen[0].width, chosen[0].height
            _refuse_large(medium, width, height, max_pixels)
            pixels: dict[int, np.ndarray] = {}
            for frame in chosen:
                if id(frame) not in pixels:
                    pixels[id(frame)] = frame.reformat(
                        width, height, format="rgb24", threads=1
                    ).to_ndarray()
            return np.stack([pixels[id(frame)] for frame in chosen])


@contextmanager
def _open_video(medium: Medium, max_pixels: int) -> Iterator[tuple[InputContainer, VideoStream]]:
    options = {"format_whitelist": _CLIPS, "protocol_whitelist": "none"}
    with av.open(io.BytesIO(medium.data), mode="r", options=options) as container:
        if not container.streams.video:
            raise BrokenMediumError(medium.source, "the file holds no video")
        stream = container.streams.video[0]
        context = stream.codec_context
        _refuse_large(medium, context.width, context.height, max_pixels)
        # The decoder enforces the bound again: a stream may change its size on the way.
        context.options = {"max_pixels": str(max_pixels)}
        context.thread_count = 1
        yield container, stream


def _timeline(
    medium: Medium, container: InputContainer, stream: VideoStream, max_packets: int
) -> tuple[list[int], list[int]]:
    """Presentation times of all frames, ascending, and those of the key frames, by demuxing only.

    Without presentation times frames are numbered instead, and there are no key frames to seek.
    """
    times: list[int | None] = []
    keys: list[int] = []
    for packet in container.demux(stream):
        if packet.size == 0:  # the flush at the end
            continue
        if packet.is_corrupt:
            raise BrokenMediumError(medium.source, "the video is truncated")
        times.append(packet.pts)
        if packet.is_keyframe and packet.pts is not None:
            keys.append(packet.pts)
        if len(times) > max_packets:
            raise BrokenMediumError(medium.source, f"the video has more than {max_packets} frames")
    if not times:
        raise BrokenMediumError(medium.source, "the video holds no frame")
    known = [time for time in times if time is not None]
    if len(known) < len(times):
        return list(range(len(times))), []
    return sorted(known), sorted(keys)


def _frames_at(
    medium: Medium,
    container: InputContainer,
    stream: VideoStream,
    wanted: list[int],
    keys: list[int],
    max_frames: int,
) -> list[VideoFrame]:
    """The first frame at or after each of the ascending times ``wanted``; the last one at the end.

    ``keys`` are the times of key frames that may be entered; empty when a seek is not reliable.
    """
    chosen: list[VideoFrame] = []
    decoded = 0
    frame: VideoFrame | None = None
    now = -1
    source = container.decode(stream)
    for time in wanted:
        entry = max((key for key in keys if key <= time), default=None)
        if entry is not None and frame is not None and entry > now + 1:
            container.seek(entry, stream=stream)
            source = container.decode(stream)
        while frame is None or now < time:
            following = next(source, None)
            if following is None:
                break
            frame = following
            now = frame.pts if frame.pts is not None else decoded
            decoded += 1
            if decoded > max_frames:
                raise BrokenMediumError(
                    medium.source, f"more than {max_frames} frames lie before the wanted ones"
                )
        if frame is None or frame.is_corrupt:
            raise BrokenMediumError(medium.source, "the video's frames cannot be decoded")
        chosen.append(frame)
    return chosen
