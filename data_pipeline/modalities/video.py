"""Clips without their sound; the image tower takes them."""

from __future__ import annotations

import numpy as np

from data_pipeline.reading.decode import DecodeLimits, decode_video, probe_video
from data_pipeline.reading.medium import Medium
from data_pipeline.reading.modality import Length, Modality
from data_pipeline.reading.prepare import picture_side, square
from data_pipeline.reading.preview import preview_clip
from unimoe_mcore.config.towers import (
    EncoderConfig,
    TowerConfig,
    connector_tokens,
    picture_cells,
)


def _prepare(medium: Medium, encoder: EncoderConfig, limits: DecodeLimits) -> np.ndarray:
    frames = decode_video(
        medium,
        encoder.frames,
        limits.max_frame_pixels,
        limits.max_frames,
        limits.max_packets,
        limits.max_bytes,
    )
    return np.stack([square(frame, encoder) for frame in frames])


def _tokens(tower: TowerConfig, duration_ms: int) -> int:
    if tower.frame_order == "average":
        return connector_tokens(tower.connector, picture_cells(tower.encoder))
    return tower.encoder.frames


def _length(medium: Medium, limits: DecodeLimits) -> Length:
    facts = probe_video(medium, limits)
    return Length(facts.duration_ms, facts.frames)


def _made(encoder: EncoderConfig, chance: np.random.Generator) -> tuple[np.ndarray, int]:
    side = picture_side(encoder)
    return chance.integers(0, 256, (encoder.frames, side, side, 3), dtype=np.uint8), 0


MODALITY = Modality(
    about="a video",
    prepare=_prepare,
    tokens=_tokens,
    work=lambda encoder, duration_ms: float(encoder.frames),
    unit="frames of video",
    made=_made,
    length=_length,
    tower="image",
    preview=preview_clip,
)
