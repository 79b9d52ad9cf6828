"""What speech and other sounds have in common as modalities: they last."""

from __future__ import annotations

import numpy as np

from data_pipeline.reading.decode import DecodeLimits, probe_sound
from data_pipeline.reading.medium import Medium
from data_pipeline.reading.modality import Length, Modality
from data_pipeline.reading.prepare import SAMPLES_PER_FEATURE, waveform
from data_pipeline.reading.preview import preview_sound
from unimoe_mcore.config.towers import (
    FEATURES_PER_SECOND,
    EncoderConfig,
    TowerConfig,
    connector_tokens,
    sound_features,
)

_MADE_MS = 10_000


def recorded(about: str, unit: str) -> Modality:
    """A modality of recordings.

    Args:
        about: what a person gives.
        unit: seconds of what, for tables.
    """
    return Modality(
        about=about,
        prepare=waveform,
        tokens=_tokens,
        work=_seconds,
        unit=unit,
        made=_made,
        length=_length,
        promised=lambda encoder, duration_ms: sound_features(duration_ms, encoder),
        features=lambda samples: len(samples) // SAMPLES_PER_FEATURE,
        preview=preview_sound,
    )


def _tokens(tower: TowerConfig, duration_ms: int) -> int:
    return connector_tokens(tower.connector, sound_features(duration_ms, tower.encoder))


def _seconds(encoder: EncoderConfig, duration_ms: int) -> float:
    return sound_features(duration_ms, encoder) / FEATURES_PER_SECOND


def _length(medium: Medium, limits: DecodeLimits) -> Length:
    return Length(probe_sound(medium, limits).duration_ms)


def _made(encoder: EncoderConfig, chance: np.random.Generator) -> tuple[np.ndarray, int]:
    features = sound_features(_MADE_MS, encoder)
    noise = chance.normal(0, 0.1, features * SAMPLES_PER_FEATURE)
    return noise.astype(np.float32), _MADE_MS
