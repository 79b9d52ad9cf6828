"""The way of pictures and videos to square pixels and back to one tensor per medium."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import batched

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data_pipeline.reading.decode import decode_image, decode_video
from data_pipeline.reading.medium import Medium

PICTURE_LIBRARIES = ("av", "numpy", "pillow")
"""Distributions that a picture or video passes through on its way to a network."""


def encode_pictures(
    media: list[Medium],
    side: int,
    frames: int,
    batch: int,
    run: Callable[[Tensor], Tensor],
) -> list[Tensor]:
    """Decode pictures and videos, run them through a network in batches, sort them by medium.

    Every batch has exactly ``batch`` pictures, the last one filled with black: kernels of
    different batch sizes round differently, and features must not depend on their neighbours.
    At most one medium more than a batch is decoded at a time.

    Args:
        media: images and videos.
        side: side of the square that each picture is resized to (antialiased bilinear), pixels.
        frames: frames taken from a video.
        batch: pictures per batch.
        run: from uint8 ``[batch, side, side, 3]`` to ``[batch, cells, feature_size]``.

    Returns:
        For each image ``[cells, feature_size]``, for each video
        ``[frames, cells, feature_size]``.
    """
    done: list[Tensor] = []
    for group in batched(_squares(media, side, frames), batch):
        pixels = np.zeros((batch, side, side, 3), np.uint8)
        pixels[: len(group)] = group
        done.extend(run(torch.from_numpy(pixels))[: len(group)])
    features = iter(done)
    return [
        torch.stack([next(features) for _ in range(frames)])
        if medium.modality == "video"
        else next(features)
        for medium in media
    ]


def _squares(media: list[Medium], side: int, frames: int) -> Iterator[np.ndarray]:
    for medium in media:
        video = medium.modality == "video"
        pictures = decode_video(medium, frames) if video else decode_image(medium)[None]
        for picture in pictures:
            square = Image.fromarray(picture).resize((side, side), Image.Resampling.BILINEAR)
            yield np.asarray(square)
