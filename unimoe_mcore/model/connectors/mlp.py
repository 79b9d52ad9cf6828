"""The projector of LLaVA and Uni-MoE: two linear layers with a GELU between them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from unimoe_mcore.config.towers import ConnectorConfig
from unimoe_mcore.model.connectors.base import Connector, places, register_connector
from unimoe_mcore.model.operations import Operations, linear


@register_connector("mlp2x_gelu")
class MlpConnector(Connector):
    """Every ``stack`` adjacent features of a medium become one token.

    The last token of a medium is filled with zeros; what exceeds ``max_tokens`` is cut off.
    """

    def __init__(
        self,
        config: ConnectorConfig,
        feature_size: int,
        hidden_size: int,
        features: int | None,
    ) -> None:
        super().__init__(config, hidden_size, features)
        width = feature_size * config.stack
        self.norm = nn.LayerNorm(width) if config.input_norm else nn.Identity()
        self.project = nn.Sequential(
            nn.Linear(width, hidden_size), nn.GELU(), nn.Linear(hidden_size, hidden_size)
        )

    def _connect(self, features: Tensor, lengths: list[int]) -> Tensor:
        return self.project(self.norm(self._stacked(features, lengths)))

    def operations(self, lengths: list[int]) -> Operations:
        """Two products a token; towards the features only because a norm before them trains."""
        tokens = sum(self.tokens(length) for length in lengths)
        first, last = self.project[0], self.project[2]
        towards = self.trained and self.config.input_norm
        return linear(tokens, first, towards, self.trained) + linear(
            tokens, last, self.trained, self.trained
        )

    def _stacked(self, features: Tensor, lengths: list[int]) -> Tensor:
        """``[total, feature_size]`` to ``[sum of tokens, stack * feature_size]``."""
        stack = self.config.stack
        device = features.device
        counts = [self.tokens(length) for length in lengths]
        slots = places([count * stack for count in counts], device)
        sizes = torch.tensor(lengths, dtype=torch.long, device=device)
        repeats = torch.tensor(counts, dtype=torch.long, device=device) * stack
        starts = torch.repeat_interleave(sizes.cumsum(0) - sizes, repeats)
        # Slots behind a medium's end read the row of zeros that is appended.
        behind = slots >= torch.repeat_interleave(sizes, repeats)
        rows = torch.where(behind, len(features), starts + slots)
        padded = torch.cat([features, features.new_zeros(1, features.shape[1])])
        return padded[rows].view(-1, stack * features.shape[1])
