"""What the index says about the length of a recording or a clip: what the decoder will say.

Nothing is decoded here, and nothing decided: lengths and limits are ``reading.decode``'s, since
the plan makes place for the features that the encoder will count from the same length.
"""

from __future__ import annotations

from data_pipeline.reading.decode import BrokenMediumError, probe_sound, probe_video
from data_pipeline.reading.medium import Medium

_NAMELESS = "a medium"  # a broken one is not reported here, so that its name is not needed


def sound_duration_ms(data: bytes) -> int:
    """Length of a recording in milliseconds, rounded; 0 for one that the decoder refuses."""
    try:
        return probe_sound(Medium("speech", data, _NAMELESS)).duration_ms
    except BrokenMediumError:
        return 0


def video_length(data: bytes) -> tuple[int, int]:
    """Length in milliseconds and number of frames of a video's first picture stream.

    Both are 0 for a video that the decoder refuses before it decodes.
    """
    try:
        facts = probe_video(Medium("video", data, _NAMELESS))
    except BrokenMediumError:
        return 0, 0
    return facts.duration_ms, facts.frames
