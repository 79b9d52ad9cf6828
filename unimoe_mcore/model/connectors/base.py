"""What every connector is, and the registry that finds one by its name."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import ClassVar, TypeVar

import torch
from torch import Tensor, nn

from unimoe_mcore.config.errors import UserError
from unimoe_mcore.config.towers import ConnectorConfig, connector_tokens
from unimoe_mcore.model.operations import Operations


class Connector(nn.Module):
    """A trained module from the features of several media to language-model embeddings.

    Media lie packed after one another, so nothing is padded. An empty batch gives an empty
    result of which every parameter is still an ancestor: backward then leaves gradients of zero,
    not None, and ranks without a medium reduce the same gradients as the others.

    Attributes:
        config: the configuration it was built from.
        most: most tokens that one medium becomes.
        positions: learned ``[most, hidden]``, added to the tokens by their place in their medium.
    """

    name: ClassVar[str]

    def __init__(self, config: ConnectorConfig, hidden_size: int, features: int | None) -> None:
        super().__init__()
        self.config = config
        self.most = connector_tokens(config, features or config.max_tokens * config.stack)
        self.positions: nn.Parameter | None = None
        if config.positions:
            self.positions = nn.Parameter(torch.randn(self.most, hidden_size) * 0.02)

    def tokens(self, features: int) -> int:
        """Tokens that a medium of ``features`` features becomes."""
        return connector_tokens(self.config, features)

    def forward(self, features: Tensor, lengths: list[int]) -> Tensor:
        """Connect media.

        Args:
            features: ``[total, feature_size]`` in any floating-point type, media after one
                another.
            lengths: features of each medium, each at least 1; their sum is ``total``.

        Returns:
            ``[sum of tokens, hidden]`` in the type of the weights, media after one another.

        Raises:
            ValueError: the lengths do not fit the features, or a medium becomes more tokens than
                the connector was built for.
        """
        if sum(lengths) != len(features) or any(length < 1 for length in lengths):
            raise ValueError(f"lengths {lengths} do not divide {len(features)} features")
        counts = [self.tokens(length) for length in lengths]
        if max(counts, default=0) > self.most:
            raise ValueError(f"a medium becomes {max(counts)} tokens; at most {self.most} fit")
        embeddings = self._connect(features.to(next(self.parameters()).dtype), lengths)
        if self.positions is None:
            return embeddings
        return embeddings + self.positions[places(counts, embeddings.device)]

    def _connect(self, features: Tensor, lengths: list[int]) -> Tensor:
        """``forward`` without positions."""
        raise NotImplementedError

    @property
    def trained(self) -> bool:
        """Whether it trains; a connector trains as a whole."""
        return any(parameter.requires_grad for parameter in self.parameters())

    def operations(self, lengths: list[int]) -> Operations:
        """Needed operations for media of these many features, whose own gradient nobody needs.

        None where a connector does not say: its work is then missing in a run's MFU.
        """
        return Operations()


def places(counts: list[int], device: torch.device) -> Tensor:
    """``[sum of counts]``: 0, 1, ... within each group of that many."""
    sizes = torch.tensor(counts, dtype=torch.long, device=device)
    starts = torch.repeat_interleave(sizes.cumsum(0) - sizes, sizes)
    return torch.arange(sum(counts), device=device) - starts


_CONNECTORS: dict[str, type[Connector]] = {}
_Class = TypeVar("_Class", bound=type[Connector])


def register_connector(name: str) -> Callable[[_Class], _Class]:
    """Class decorator: make a connector known by ``name``.

    Files of the package ``unimoe_mcore.model.connectors`` are found without being listed.
    """

    def register(connector: _Class) -> _Class:
        connector.name = name
        _CONNECTORS[name] = connector
        return connector

    return register


def build_connector(
    config: ConnectorConfig, feature_size: int, hidden_size: int, tokens: int | None
) -> Connector:
    """Build the connector that ``config`` names.

    Args:
        config: its configuration.
        feature_size: width of the encoder's features.
        hidden_size: width of the language model's embeddings.
        tokens: features of every medium where their number is fixed (the cells of a picture), so
            that no position is learned that cannot occur; None where it varies.

    Raises:
        UserError: the name is unknown, or the configuration does not fit together.
    """
    package = __name__.rpartition(".")[0]
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
        importlib.import_module(f"{package}.{module.name}")
    if config.name not in _CONNECTORS:
        raise UserError(
            f"There is no connector '{config.name}'; "
            f"choose one of {', '.join(sorted(_CONNECTORS))}."
        )
    if min(config.stack, config.max_tokens) < 1:
        raise UserError("`connector.stack` and `connector.max_tokens` are at least 1.")
    return _CONNECTORS[config.name](config, feature_size, hidden_size, tokens)  # type: ignore[call-arg]
