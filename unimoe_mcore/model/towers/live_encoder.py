"""An encoder that trains: run anew for every medium, with gradient, in place of a feature cache."""

from __future__ import annotations

import torch
from torch import Tensor

from data_pipeline.reading.medium import Medium
from unimoe_mcore.model.towers.encoders import Encoder


class LiveEncoder:
    """What a tower asks for features where its encoder trains.

    Features change with every step, so nothing is read from disk or written there.

    Attributes:
        encoder: the encoder; the tower holds it as a submodule.
        folder: None: there are no stored features, whoever reads samples decodes all media.
        operations: of the encoder so far; with gradient three times the forward pass (the backward
            pass of the first layer, which needs none towards its input, is counted like others).
    """

    folder = None

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        self.operations = 0

    def features(self, media: list[Medium]) -> list[Tensor]:
        """Features of every medium, in the type and on the device of the weights.

        Raises:
            BrokenMediumError: a medium cannot be decoded.
        """
        found: list[Tensor] = self.encoder(media) if media else []
        passes = 3 if torch.is_grad_enabled() else 1
        self.operations += passes * sum(self.encoder.operations(each) for each in found)
        return found

    def nothing(self) -> Tensor:
        """Features of no medium, ``[0, feature_size]``, of which every weight is an ancestor.

        A rank without a medium then has gradients of zero to reduce, like all others.
        """
        ends = [weight.reshape(-1)[:0] for weight in self.encoder.parameters()]
        return torch.cat(ends).view(0, self.encoder.feature_size)

    def release(self) -> None:
        """Nothing: what trains stays on every rank."""
