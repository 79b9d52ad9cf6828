"""One piece of media as it travels from shard to encoder: its bytes and where they came from."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

MODALITIES = ("image", "video", "speech", "audio")
"""Every modality but text, in the order in which combinations are named."""


@dataclass(frozen=True)
class Medium:
    """The undecoded bytes of one picture, clip or recording.

    Decoding is left to whoever needs pixels or samples: a medium whose features are cached is
    never decoded.

    Attributes:
        modality: one of ``MODALITIES``.
        data: the file's bytes as they lie in the shard.
        source: ``shard.tar:member``, for messages.
    """

    modality: str
    data: bytes
    source: str

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the bytes, hexadecimal."""
        return hashlib.sha256(self.data).hexdigest()
