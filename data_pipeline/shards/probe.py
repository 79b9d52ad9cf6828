"""How long a recording or a clip is, from its container's header, without decoding it."""

from __future__ import annotations

import io

import av
import av.error
import soundfile

MAX_DURATION_MS = 6 * 3600 * 1000
"""Longest sound or video that is believed, milliseconds; a longer claim is a broken header."""
MAX_FRAMES = 1_000_000
"""Most frames that are counted in one video."""


def sound_duration_ms(data: bytes) -> int:
    """Length of a recording in milliseconds, rounded; 0 where the header cannot be read."""
    try:
        info = soundfile.info(io.BytesIO(data))
    except (soundfile.LibsndfileError, RuntimeError, ValueError):
        return 0
    if info.samplerate <= 0:
        return 0
    return _believable(round(1000 * info.frames / info.samplerate))


def video_length(data: bytes) -> tuple[int, int]:
    """Length in milliseconds and number of frames of a video's first picture stream.

    Both are 0 where the container cannot be read or has no picture stream.
    """
    try:
        with av.open(io.BytesIO(data), mode="r") as container:
            if not container.streams.video:
                return 0, 0
            stream = container.streams.video[0]
            frames = stream.frames
            if frames <= 0:  # containers without a frame count: packets are cheap to list
                frames = _count_packets(container, stream)
            seconds = 0.0
            if stream.duration and stream.time_base:
                seconds = float(stream.duration * stream.time_base)
            elif container.duration:
                seconds = container.duration / av.time_base
            elif stream.average_rate:
                seconds = float(frames / stream.average_rate)
    except (av.error.FFmpegError, ValueError, OverflowError):
        return 0, 0
    if not 0 < frames <= MAX_FRAMES:
        return 0, 0
    return _believable(round(1000 * seconds)), frames


def _count_packets(container: av.container.InputContainer, stream: av.VideoStream) -> int:
    frames = 0
    for packet in container.demux(stream):
        frames += packet.size > 0
        if frames > MAX_FRAMES:
            break
    return frames


def _believable(duration_ms: int) -> int:
    return duration_ms if 0 <= duration_ms <= MAX_DURATION_MS else 0
