"""One piece of media as it travels from shard to encoder: its bytes and where they came from."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from pickle import PickleBuffer
from typing import Any, SupportsIndex

import numpy as np


@dataclass(frozen=True)
class Medium:
    """One picture, clip or recording.

    A medium whose features are cached is never decoded; the others are, by whoever reads the
    sample or, if nobody did, by the encoder.

    Attributes:
        modality: one of ``data_pipeline.modalities.MODALITIES``.
        data: the file's bytes as they lie in the shard.
        source: ``shard.tar:member``, for messages.
        content: what the encoder is fed, see ``prepare``; None where it is not decoded yet.
            Follows from ``data``, so that two media are equal without it.
    """

    modality: str
    data: bytes
    source: str
    content: np.ndarray | None = field(default=None, compare=False, repr=False)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the bytes, hexadecimal."""
        return hashlib.sha256(self.data).hexdigest()

    def with_content(self, content: np.ndarray) -> Medium:
        """The same medium, decoded."""
        decoded = Medium(self.modality, self.data, self.source, content)
        if "digest" in self.__dict__:
            decoded.__dict__["digest"] = self.digest
        return decoded

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        """The bytes travel beside the pickle where they can: inside they would be copied twice."""
        data = PickleBuffer(self.data) if int(protocol) >= 5 else self.data
        known = self.__dict__.get("digest")
        return _medium, (self.modality, data, self.source, self.content, known)


def _medium(
    modality: str,
    data: bytes | memoryview,
    source: str,
    content: np.ndarray | None,
    digest: str | None,
) -> Medium:
    medium = Medium(modality, bytes(data), source, content)
    if digest is not None:
        medium.__dict__["digest"] = digest
    return medium
