"""The way of pictures and videos to batches of square pixels and back to one tensor per medium."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import batched

import numpy as np
import torch
from torch import Tensor

from data_pipeline.reading.medium import Medium
from data_pipeline.reading.prepare import picture_side, prepare
from unimoe_mcore.config.towers import EncoderConfig

PICTURE_LIBRARIES = ("av", "imagecodecs", "numpy", "pillow", "simplejpeg")
"""Distributions that a picture or video passes through on its way to a network."""


def encode_pictures(
    media: list[Medium],
    config: EncoderConfig,
    batch: int,
    run: Callable[[Tensor], Tensor],
) -> list[Tensor]:
    """Run pictures and videos through a network in batches and sort them by medium.

    Every batch has exactly ``batch`` pictures, the last one filled with black: kernels of
    different batch sizes round differently, and features must not depend on their neighbours.
    Media that nobody has decoded yet are decoded here, at most one more than a batch at a time.

    Args:
        media: images and videos.
        config: of the encoder: size of the squares and frames of a video.
        batch: pictures per batch.
        run: from uint8 ``[batch, side, side, 3]`` to ``[batch, cells, feature_size]``.

    Returns:
        For each image ``[cells, feature_size]``, for each video
        ``[frames, cells, feature_size]``.
    """
    side = picture_side(config)
    done: list[Tensor] = []
    for group in batched(_squares(media, config), batch):
        pixels = np.zeros((batch, side, side, 3), np.uint8)
        pixels[: len(group)] = group
        done.extend(run(torch.from_numpy(pixels))[: len(group)])
    features = iter(done)
    return [
        torch.stack([next(features) for _ in range(config.frames)])
        if medium.modality == "video"
        else next(features)
        for medium in media
    ]


def _squares(media: list[Medium], config: EncoderConfig) -> Iterator[np.ndarray]:
    for medium in media:
        content = prepare(medium, config) if medium.content is None else medium.content
        yield from content if medium.modality == "video" else content[None]
