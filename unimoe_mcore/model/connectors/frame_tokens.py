"""One token per frame of a video, in order."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from unimoe_mcore.model.operations import Operations, linear


class FrameReducer(nn.Module):
    """Each frame's cells, narrowed and flattened, become one token.

    Averaging frames, as the paper does, loses the direction of a movement; all cells of all
    frames would be too many tokens.

    Attributes:
        frames: frames of every video.
    """

    def __init__(
        self, feature_size: int, cells: int, channels: int, hidden: int, frames: int
    ) -> None:
        super().__init__()
        self.frames = frames
        self.cells = cells
        self.narrow = nn.Sequential(nn.LayerNorm(feature_size), nn.Linear(feature_size, channels))
        self.project = nn.Sequential(
            nn.LayerNorm(cells * channels),
            nn.Linear(cells * channels, hidden),
            nn.GELU(),
            nn.Linear(hidden, hidden),
        )
        self.positions = nn.Parameter(torch.randn(frames, hidden) * 0.02)

    def operations(self, videos: int) -> Operations:
        """Needed operations for some videos, whose features' own gradient nobody needs."""
        trained = self.positions.requires_grad
        frames = videos * self.frames
        # Towards the input of all three: a norm that trains lies before the first.
        return (
            linear(frames * self.cells, self.narrow[1], trained, trained)
            + linear(frames, self.project[1], trained, trained)
            + linear(frames, self.project[3], trained, trained)
        )

    def forward(self, features: Tensor) -> Tensor:
        """Connect videos; an empty batch keeps every parameter in the graph.

        Args:
            features: ``[videos, frames, cells, feature_size]`` in any floating-point type.

        Returns:
            ``[videos * frames, hidden]`` in the type of the weights, frames in order.

        Raises:
            ValueError: the videos have another number of frames.
        """
        if features.shape[1] != self.frames:
            raise ValueError(f"videos of {self.frames} frames wanted, not of {features.shape[1]}")
        narrow = self.narrow(features.to(self.positions.dtype))
        return (self.project(narrow.flatten(2)) + self.positions).flatten(0, 1)
