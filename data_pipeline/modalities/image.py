"""Pictures."""

from __future__ import annotations

import numpy as np

from data_pipeline.reading.decode import DecodeLimits, decode_image
from data_pipeline.reading.medium import Medium
from data_pipeline.reading.modality import Modality
from data_pipeline.reading.prepare import picture_side, square
from data_pipeline.reading.preview import preview_picture
from unimoe_mcore.config.towers import (
    EncoderConfig,
    TowerConfig,
    connector_tokens,
    picture_cells,
)


def _prepare(medium: Medium, encoder: EncoderConfig, limits: DecodeLimits) -> np.ndarray:
    return square(decode_image(medium, limits.max_pixels, limits.max_bytes), encoder)


def _tokens(tower: TowerConfig, duration_ms: int) -> int:
    return connector_tokens(tower.connector, picture_cells(tower.encoder))


def _made(encoder: EncoderConfig, chance: np.random.Generator) -> tuple[np.ndarray, int]:
    side = picture_side(encoder)
    return chance.integers(0, 256, (side, side, 3), dtype=np.uint8), 0


MODALITY = Modality(
    about="an image",
    prepare=_prepare,
    tokens=_tokens,
    work=lambda encoder, duration_ms: 1.0,
    unit="pictures",
    made=_made,
    preview=preview_picture,
)
