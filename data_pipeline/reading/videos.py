"""Frames of a clip by FFmpeg (PyAV), one thread, evenly spaced in time.

There is no second decoder to fall back on: every other library that reads clips is FFmpeg again.
"""

from __future__ import annotations

import io
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import av
import numpy as np
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from data_pipeline.reading.lengths import shortfall
from data_pipeline.reading.limits import (
    LARGE,
    LIMITS,
    BrokenMediumError,
    DecodeLimits,
    blame,
    refuse_size,
)
from data_pipeline.reading.medium import Medium

# FFmpeg's names. Playlists (HLS, concat, DASH) are left out: they open other files.
_CLIPS = "mov,mp4,matroska,webm,avi,mpegts,mpeg,flv,ogg"
# Containers with an index of key frames that a seek can rely on.
_SEEKABLE = ("mov", "matroska")


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
        blame(medium, "video", limits.max_bytes),
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
    max_bytes: int = LIMITS.max_bytes,
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
        max_bytes: largest file, bytes.

    Returns:
        uint8 ``[frames, height, width, 3]``, RGB, in the order of time, all of the first's size.

    Raises:
        BrokenMediumError: not a video, truncated, or outside the bounds.
    """
    with blame(medium, "video", max_bytes):
        with _open_video(medium, max_pixels) as (container, stream):
            times, keys = _timeline(medium, container, stream, max_packets)
        positions = [(2 * i + 1) * len(times) // (2 * frames) for i in range(frames)]
        wanted = [times[position] for position in positions]
        with _open_video(medium, max_pixels) as (container, stream):
            seekable = keys if any(name in container.format.name for name in _SEEKABLE) else []
            chosen = _frames_at(medium, container, stream, wanted, seekable, max_frames)
            width, height = chosen[0].width, chosen[0].height
            refuse_size(medium, width, height, max_pixels)
            pixels: dict[int, np.ndarray] = {}
            for frame in chosen:
                if id(frame) not in pixels:
                    pixels[id(frame)] = frame.reformat(
                        width, height, format="rgb24", threads=1
                    ).to_ndarray()
            return np.stack([pixels[id(frame)] for frame in chosen])


@contextmanager
def _open_video(medium: Medium, max_pixels: int) -> Iterator[tuple[InputContainer, VideoStream]]:
    if problem := shortfall(medium.data):
        raise BrokenMediumError(medium.source, f"in the video {problem}")
    options = {"format_whitelist": _CLIPS, "protocol_whitelist": "none"}
    with av.open(io.BytesIO(medium.data), mode="r", options=options) as container:
        if not container.streams.video:
            raise BrokenMediumError(medium.source, "the file holds no video")
        stream = container.streams.video[0]
        context = stream.codec_context
        refuse_size(medium, context.width, context.height, max_pixels)
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
            raise BrokenMediumError(
                medium.source, f"the video has more than {max_packets} frames", LARGE
            )
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
        before = bisect_right(keys, time)
        entry = keys[before - 1] if before else None
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
                    medium.source,
                    f"more than {max_frames} frames lie before the wanted ones",
                    LARGE,
                )
        if frame is None or frame.is_corrupt:
            raise BrokenMediumError(medium.source, "the video's frames cannot be decoded")
        chosen.append(frame)
    return chosen
