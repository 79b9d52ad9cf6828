"""Tiny encoders with random, seeded weights: the stand-ins of tests and dry runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from data_pipeline.reading.medium import Medium
from data_pipeline.reading.prepare import FIXED_SIDES, SAMPLES_PER_FEATURE
from unimoe_mcore.config.towers import EncoderConfig, picture_cells
from unimoe_mcore.model.towers.encoders.base import Encoder, register_encoder
from unimoe_mcore.model.towers.encoders.pictures import PICTURE_LIBRARIES, encode_pictures
from unimoe_mcore.model.towers.encoders.sounds import (
    SOUND_LIBRARIES,
    sound_settings,
    waveform,
)

_CELL = FIXED_SIDES["random_image"] // 2  # pixels; a picture is two by two such cells


def _projection(inputs: int, outputs: int) -> nn.Parameter:
    """N(0, 1/inputs) of a fixed seed, without touching torch's global generator."""
    noise = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(0))
    return nn.Parameter(noise * inputs**-0.5)


@register_encoder("random_image")
class RandomImage(Encoder):
    """Four cells of 8 x 8 pixels, each projected at random."""

    modalities = ("image", "video")
    version = 1
    libraries = PICTURE_LIBRARIES

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config, config.feature_size, cells=picture_cells(config))
        self.projection = _projection(_CELL * _CELL * 3, config.feature_size)

    def settings(self) -> dict[str, Any]:
        """Frames of a video."""
        return {"frames": self.config.frames}

    def _encode(self, media: list[Medium]) -> list[Tensor]:
        return encode_pictures(media, self.config, 8, self._run)

    def operations(self, features: Tensor) -> int:
        """One product."""
        return 2 * features.numel() * self.projection.shape[1]

    def _run(self, pixels: Tensor) -> Tensor:
        x = pixels.to(self.projection.device).float() / 127.5 - 1
        grid = x.view(len(x), 2, _CELL, 2, _CELL, 3).permute(0, 1, 3, 2, 4, 5)
        cells = grid.reshape(len(x), 4, -1).to(self.projection.dtype)
        return torch.tanh(2 * cells @ self.projection.T)


@register_encoder("random_sound")
class RandomSound(Encoder):
    """Stretches of 20 ms, each projected at random."""

    modalities = ("speech", "audio")
    version = 1
    libraries = SOUND_LIBRARIES

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config, config.feature_size)
        self.projection = _projection(SAMPLES_PER_FEATURE, config.feature_size)

    def settings(self) -> dict[str, Any]:
        """How much of a recording is encoded."""
        return sound_settings(self.config)

    def _encode(self, media: list[Medium]) -> list[Tensor]:
        return [self._one(medium) for medium in media]

    def operations(self, features: Tensor) -> int:
        """One product."""
        return 2 * features.numel() * self.projection.shape[1]

    def _one(self, medium: Medium) -> Tensor:
        x = torch.from_numpy(waveform(medium, self.config)).to(self.projection)
        return torch.tanh(10 * x.view(-1, SAMPLES_PER_FEATURE) @ self.projection.T)
