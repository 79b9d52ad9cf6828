"""What the index says about the length of a recording or a clip: what the decoder will say.

Nothing is decoded here, and nothing decided: lengths and limits are ``reading.decode``'s, since
the plan makes place for the features that the encoder will count from the same length.
"""

from __future__ import annotations

from data_pipeline.reading.decode import BrokenMediumError, probe_sound, probe_video
from data_pipeline.reading.medium import Medium

_NAMELESS = "a medium"  # a broken one is not reported here, so that its name is not needed


def media_length(modality: str, data: bytes) -> tuple[int, int]:
    """Length in milliseconds, rounded, and number of frames of a medium.

    Both are 0 for pictures and for what the decoder refuses before it decodes; a sound has no
    frames.
    """
    try:
        if modality == "video":
            video = probe_video(Medium("video", data, _NAMELESS))
            return video.duration_ms, video.frames
        if modality != "image":
            return probe_sound(Medium(modality, data, _NAMELESS)).duration_ms, 0
    except BrokenMediumError:
        pass
    return 0, 0
