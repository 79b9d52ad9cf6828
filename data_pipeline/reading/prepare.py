"""From a medium's bytes to what its encoder is fed: decoded, in the encoder's size or length.

It depends on nothing that an encoder learns, so that whoever reads a sample can do it ahead, in
another process than the one that trains.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from data_pipeline.modalities import modality
from data_pipeline.reading.decode import LIMITS, DecodeLimits, decode_sound, probe_sound
from data_pipeline.reading.medium import Medium
from unimoe_mcore.config.towers import FEATURES_PER_SECOND, EncoderConfig, sound_features

RATE = 16_000
"""Sampling rate that encoders of sound read, Hz."""

SAMPLES_PER_FEATURE = RATE // FEATURES_PER_SECOND
"""Samples under one feature of 20 ms."""

FIXED_SIDES = {"random_image": 16}
"""Side of the square, pixels, that an encoder sees whatever ``resolution`` says, by its name."""


def prepare(medium: Medium, encoder: EncoderConfig, limits: DecodeLimits = LIMITS) -> np.ndarray:
    """Decode a medium for an encoder.

    Returns:
        What its modality says; of the first ones: for an image uint8 ``[side, side, 3]``
        (antialiased bilinear); for a video uint8 ``[frames, side, side, 3]``; for speech and audio
        ``waveform``.

    Raises:
        BrokenMediumError: the medium cannot be decoded, or not within the limits.
    """
    return modality(medium.modality).prepare(medium, encoder, limits)


def picture_side(encoder: EncoderConfig) -> int:
    """Side of the square that each picture is resized to, pixels."""
    return FIXED_SIDES.get(encoder.name, encoder.resolution)


def square(picture: np.ndarray, encoder: EncoderConfig) -> np.ndarray:
    """A picture in the encoder's size, uint8 ``[side, side, 3]``."""
    side = picture_side(encoder)
    resized = Image.fromarray(picture).resize((side, side), Image.Resampling.BILINEAR)
    return np.asarray(resized)


def waveform(medium: Medium, encoder: EncoderConfig, limits: DecodeLimits) -> np.ndarray:
    """Sound, float32 ``[features * 320]`` at 16 kHz, with silence up to the features promised.

    They are ``sound_features(duration_ms, encoder)``.

    Raises:
        BrokenMediumError: it cannot be decoded.
    """
    features = sound_features(probe_sound(medium, limits).duration_ms, encoder)
    length = features * SAMPLES_PER_FEATURE
    samples = decode_sound(medium, encoder.max_seconds, RATE, limits)[:length]
    padded = np.zeros(length, np.float32)
    padded[: len(samples)] = samples
    return padded
