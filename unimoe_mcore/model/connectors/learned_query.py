"""Learned queries that look at a medium's features, after the paper's Q-Former."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unimoe_mcore.config.errors import UserError
from unimoe_mcore.config.towers import ConnectorConfig
from unimoe_mcore.model.connectors.base import Connector, places, register_connector
from unimoe_mcore.model.operations import Operations, product, scores


class QueryLayer(nn.Module):
    """Pre-LayerNorm block: queries attend to features, then an MLP of four times the width."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.output = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, queries: Tensor, features: Tensor, mask: Tensor) -> Tensor:
        """Update the queries.

        Args:
            queries: ``[media, queries, width]``.
            features: ``[media, longest, width]``.
            mask: bool ``[media, 1, 1, longest]``, true where there is a feature.
        """
        key, value = self.key_value(features).chunk(2, dim=-1)
        attended = F.scaled_dot_product_attention(
            self._split(self.query(self.attention_norm(queries))),
            self._split(key),
            self._split(value),
            attn_mask=mask,
        )
        queries = queries + self.output(attended.transpose(1, 2).flatten(2))
        return queries + self.mlp(self.mlp_norm(queries))

    def _split(self, x: Tensor) -> Tensor:
        """``[media, length, width]`` to ``[media, heads, length, width / heads]``."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


@register_connector("learned_query")
class QueryConnector(Connector):
    """As many tokens as queries, however long the medium.

    The queries begin as N(0, 0.02): the official zeros, without a position embedding, are equal
    rows that only dropout noise tells apart.
    """

    def __init__(
        self,
        config: ConnectorConfig,
        feature_size: int,
        hidden_size: int,
        features: int | None,
    ) -> None:
        super().__init__(config, hidden_size, features)
        if not 1 <= config.queries <= config.max_tokens:
            raise UserError(
                f"`connector.queries` is {config.queries}; it lies between 1 and "
                f"`connector.max_tokens`, {config.max_tokens}."
            )
        if config.stack != 1:
            raise UserError("`connector.stack` has no meaning for learned_query; leave it at 1.")
        if config.layers < 1 or config.heads < 1 or feature_size % config.heads:
            raise UserError(
                f"learned_query needs at least one layer and a number of heads that divides the "
                f"encoder's {feature_size} features; it has {config.layers} and {config.heads}."
            )
        self.queries = nn.Parameter(torch.randn(config.queries, feature_size) * 0.02)
        self.norm = nn.LayerNorm(feature_size) if config.input_norm else nn.Identity()
        self.layers = nn.ModuleList(
            QueryLayer(feature_size, config.heads) for _ in range(config.layers)
        )
        self.output_norm = nn.LayerNorm(feature_size)
        self.project = nn.Linear(feature_size, hidden_size)

    def operations(self, lengths: list[int]) -> Operations:
        """Every layer's projections, attention of every query to every feature, and its MLP."""
        trained, width = self.trained, self.output_norm.normalized_shape[0]
        features, queries = sum(lengths), self.config.queries * len(lengths)
        towards = trained and self.config.input_norm
        layer = (
            product(queries, width, 2 * width, trained, trained)  # query and output
            + product(features, width, 2 * width, towards, trained)
            + scores(self.config.queries * features, width, trained)
            + product(queries, width, 8 * width, trained, trained)
        )
        out = self.project.out_features
        return layer.times(len(self.layers)) + product(queries, width, out, trained, trained)

    def _connect(self, features: Tensor, lengths: list[int]) -> Tensor:
        media, longest = len(lengths), max(lengths, default=1)
        sizes = torch.tensor(lengths, dtype=torch.long, device=features.device)
        owners = torch.repeat_interleave(torch.arange(media, device=features.device), sizes)
        padded = features.new_zeros(media, longest, features.shape[1])
        padded = padded.index_put((owners, places(lengths, features.device)), self.norm(features))
        mask = torch.arange(longest, device=features.device) < sizes[:, None]
        x = self.queries.expand(media, -1, -1)
        for layer in self.layers:
            x = layer(x, padded, mask[:, None, None])
        return self.project(self.output_norm(x)).flatten(0, 1)
