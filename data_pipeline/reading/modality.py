"""What the system must know about a modality, besides the encoder that reads it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from data_pipeline.reading.limits import DecodeLimits
from data_pipeline.reading.medium import Medium
from data_pipeline.reading.preview import Preview
from unimoe_mcore.config.towers import EncoderConfig, TowerConfig


@dataclass(frozen=True)
class Length:
    """How long a medium is, by its header.

    Attributes:
        duration_ms: milliseconds; 0 for what does not last.
        frames: pictures of a clip; 0 otherwise.
    """

    duration_ms: int = 0
    frames: int = 0


class Prepare(Protocol):
    """Decodes a medium for an encoder."""

    def __call__(self, medium: Medium, encoder: EncoderConfig, limits: DecodeLimits) -> np.ndarray:
        """Decode.

        Raises:
            BrokenMediumError: the medium cannot be decoded, or not within the limits.
        """


@dataclass(frozen=True)
class Modality:
    """One kind of media.

    Lengths and numbers of tokens follow from a file's header and the configuration: the plan counts
    them before anything is decoded.

    Attributes:
        about: what a person gives, with its article, such as ``a recording of speech``.
        prepare: from a medium's bytes to what its encoder is fed.
        tokens: language-model tokens of one medium, from its tower and its length.
        work: what its encoder computes for one medium, in ``unit``.
        unit: of ``work``, in the plural.
        length: how long a medium is, by its header; None for what does not last.
            Raises BrokenMediumError.
        promised: features of a medium of some length; None where the configuration alone says how
            many tokens a medium becomes.
        features: features that a prepared medium has; with ``promised`` only.
        tower: the tower that takes it, where that is not its own.
        preview: makes it small for a report; None: reports name it only. Raises DataError.
        made: a medium to measure the encoder with, and its length; ``prepare`` is not asked.
    """

    about: str
    prepare: Prepare
    tokens: Callable[[TowerConfig, int], int]
    work: Callable[[EncoderConfig, int], float]
    unit: str
    made: Callable[[EncoderConfig, np.random.Generator], tuple[np.ndarray, int]]
    length: Callable[[Medium, DecodeLimits], Length] | None = None
    promised: Callable[[EncoderConfig, int], int] | None = None
    features: Callable[[np.ndarray], int] | None = None
    tower: str = ""
    preview: Callable[[Medium], Preview] | None = None
