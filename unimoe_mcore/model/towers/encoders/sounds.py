"""The way of a recording to samples of exactly the length that its features promise."""

from __future__ import annotations

from typing import Any

import numpy as np

from data_pipeline.reading.decode import decode_sound, probe_sound
from data_pipeline.reading.medium import Medium
from unimoe_mcore.config.towers import FEATURES_PER_SECOND, EncoderConfig, sound_features

RATE = 16_000
"""Sampling rate that encoders of sound read, Hz."""

SAMPLES_PER_FEATURE = RATE // FEATURES_PER_SECOND
"""Samples under one feature of 20 ms."""

SOUND_LIBRARIES = ("numpy", "soundfile", "soxr")
"""Distributions that a recording passes through on its way to a network."""


def waveform(medium: Medium, config: EncoderConfig) -> np.ndarray:
    """Decode a recording and append silence up to its promised number of features.

    Returns:
        float32 ``[features * 320]`` at 16 kHz, where ``features`` is
        ``sound_features(duration_ms, config)``.

    Raises:
        BrokenMediumError: the recording cannot be decoded.
    """
    features = sound_features(probe_sound(medium).duration_ms, config)
    samples = decode_sound(medium, config.max_seconds, RATE)[: features * SAMPLES_PER_FEATURE]
    padded = np.zeros(features * SAMPLES_PER_FEATURE, np.float32)
    padded[: len(samples)] = samples
    return padded


def sound_settings(config: EncoderConfig) -> dict[str, Any]:
    """The settings on which ``waveform`` depends."""
    return {
        "max_seconds": config.max_seconds,
        "silence_seconds": config.silence_seconds,
        "pad_to_seconds": config.pad_to_seconds,
    }
