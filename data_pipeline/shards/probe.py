"""What the index says about the length of a recording or a clip: what the decoder will say.

Nothing is decoded here, and nothing decided: lengths and limits are ``reading.decode``'s, since
the plan makes place for the features that the encoder will count from the same length.
"""

from __future__ import annotations

from data_pipeline.modalities import modality
from data_pipeline.reading.decode import LIMITS, BrokenMediumError
from data_pipeline.reading.medium import Medium

_NAMELESS = "a medium"  # a broken one is not reported here, so that its name is not needed


def media_length(name: str, data: bytes) -> tuple[int, int]:
    """Length in milliseconds, rounded, and number of frames of a medium of a modality.

    Both are 0 for what does not last and for what the decoder refuses before it decodes; only
    clips have frames.
    """
    probe = modality(name).length
    if probe is None:
        return 0, 0
    try:
        found = probe(Medium(name, data, _NAMELESS), LIMITS)
    except BrokenMediumError:
        return 0, 0
    return found.duration_ms, found.frames
