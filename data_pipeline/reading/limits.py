"""What a single medium may cost, and the error of one that costs more or cannot be decoded."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from PIL import Image

from data_pipeline.errors import DataError
from data_pipeline.reading.medium import Medium

BROKEN, LARGE = "broken", "large"
"""Kinds of ``BrokenMediumError``: the bytes are damaged; or they ask for more than is allowed."""


@dataclass(frozen=True)
class DecodeLimits:
    """What a single medium may cost.

    Attributes:
        max_bytes: largest file that is looked at, bytes.
        max_pixels: most pixels of a picture.
        max_frame_pixels: most pixels of one frame of a video (5K fits).
        max_frames: most frames decoded from one video, kept or not.
        max_packets: most compressed frames that a video, or a recording that only FFmpeg reads,
            may list.
        max_channels: most channels of a recording.
        max_rate: highest sampling rate of a recording, Hz.
        max_duration_ms: longest recording or video that is believed, milliseconds.
        max_amplitude: largest absolute sample; full scale is 1, so anything beyond is not sound.
    """

    max_bytes: int = 2**29
    max_pixels: int = 2**26
    max_frame_pixels: int = 2**24
    max_frames: int = 4096
    max_packets: int = 1_000_000
    max_channels: int = 32
    max_rate: int = 384_000
    max_duration_ms: int = 6 * 3600 * 1000
    max_amplitude: float = 1e6


LIMITS = DecodeLimits()


class BrokenMediumError(DataError):
    """A medium that cannot be decoded, or may not be.

    Attributes:
        source: ``Medium.source`` of the medium.
        reason: what is wrong with it, in a few words.
        kind: ``broken`` or ``large``.
    """

    def __init__(self, source: str, reason: str, kind: str = BROKEN) -> None:
        super().__init__(f"{source}: {reason}; replace the file or leave the sample out")
        self.source = source
        self.reason = reason
        self.kind = kind

    def __reduce__(self) -> tuple[type[BrokenMediumError], tuple[str, str, str]]:
        """Exceptions are pickled by their message otherwise, which is not how this is made."""
        return type(self), (self.source, self.reason, self.kind)


@contextmanager
def blame(medium: Medium, what: str, max_bytes: int) -> Iterator[None]:
    """Look at a medium's size, then turn whatever a decoder throws into a ``BrokenMediumError``."""
    if not medium.data:
        raise BrokenMediumError(medium.source, "the file is empty")
    if len(medium.data) > max_bytes:
        raise BrokenMediumError(
            medium.source, f"{len(medium.data)} bytes are more than {max_bytes}", LARGE
        )
    try:
        yield
    except BrokenMediumError:
        raise
    # Decoders raise anything from OSError to struct.error and MemoryError on hostile bytes.
    except Exception as error:
        # Without addresses in memory, so that the same bytes always give the same words.
        detail = re.sub(r"<_io\.BytesIO object at 0x[0-9a-f]+>", "the bytes", str(error))
        detail = " ".join(detail.split())[:200] or type(error).__name__
        bomb = isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning)
        raise BrokenMediumError(
            medium.source, f"cannot decode this {what} ({detail})", LARGE if bomb else BROKEN
        ) from error


def refuse_size(medium: Medium, width: int, height: int, max_pixels: int) -> None:
    """Raise a ``BrokenMediumError`` unless there are 1 to ``max_pixels`` pixels."""
    if width < 1 or height < 1:
        raise BrokenMediumError(medium.source, f"it claims {width} x {height} pixels")
    if width * height > max_pixels:
        raise BrokenMediumError(
            medium.source, f"{width} x {height} pixels are more than {max_pixels}", LARGE
        )


# ``max_pixels`` is the limit here; Pillow's own, lower warning would only litter the logs.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
