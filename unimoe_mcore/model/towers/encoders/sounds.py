"""The way of a recording to samples of exactly the length that its features promise."""

from __future__ import annotations

from typing import Any

import numpy as np

from data_pipeline.reading.medium import Medium
from data_pipeline.reading.prepare import prepare
from unimoe_mcore.config.towers import EncoderConfig

SOUND_LIBRARIES = ("av", "numpy", "soundfile", "soxr")
"""Distributions that a recording passes through on its way to a network."""


def waveform(medium: Medium, config: EncoderConfig) -> np.ndarray:
    """A recording with silence up to its promised number of features, decoded if it is not yet.

    Returns:
        float32 ``[features * 320]`` at 16 kHz, where ``features`` is
        ``sound_features(duration_ms, config)``.

    Raises:
        BrokenMediumError: the recording cannot be decoded.
    """
    return prepare(medium, config) if medium.content is None else medium.content


def sound_settings(config: EncoderConfig) -> dict[str, Any]:
    """The settings on which ``waveform`` depends."""
    return {
        "max_seconds": config.max_seconds,
        "silence_seconds": config.silence_seconds,
        "pad_to_seconds": config.pad_to_seconds,
    }
