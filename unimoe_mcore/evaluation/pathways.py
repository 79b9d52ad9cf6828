"""The ways that tokens take through the experts, counted by modality and kind of token.

A token's pathway is its first choice, the expert with the largest weight, in every block with
experts. It is counted under the group of its sample (``GROUPS``) and under what stands at its
place: a medium or text.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from data_pipeline.reading.collate import GROUPS, MicroBatch

KINDS = ("medium", "text")
MOST_COUNTED = 20_000
"""Pathways of a group and kind that are told apart; the rarest beyond them are not counted."""
MOST_WRITTEN = 50
"""Pathways of a group and kind that are recorded."""


@dataclass
class Counted:
    """Tokens of one group and kind.

    Attributes:
        tokens: number of them.
        paths: first choices by block -> tokens that went this way.
        choices: all choices, ``[blocks, experts]``.
    """

    tokens: int = 0
    paths: Counter[tuple[int, ...]] = field(default_factory=Counter)
    choices: np.ndarray | None = None

    def add(self, first: np.ndarray, choices: np.ndarray) -> None:
        """Count some tokens.

        Args:
            first: ``[blocks, tokens]``.
            choices: ``[blocks, experts]``.
        """
        self.tokens += first.shape[1]
        ways, counts = np.unique(first.T, axis=0, return_counts=True)
        for way, count in zip(ways.tolist(), counts.tolist(), strict=True):
            self.paths[tuple(way)] += count
        if len(self.paths) > 2 * MOST_COUNTED:
            self.paths = Counter(dict(self.paths.most_common(MOST_COUNTED)))
        self.choices = choices if self.choices is None else self.choices + choices


class Pathways:
    """Counts of this rank, to be added to those of the others.

    Args:
        markers: ids of the tokens that media stand at.
    """

    def __init__(self, markers: Iterable[int]) -> None:
        self._markers = np.array(sorted(markers))
        self.blocks: list[int] = []
        self.counted: dict[tuple[str, str], Counted] = {}

    def add(
        self, batch: MicroBatch, first: Mapping[int, Tensor], chosen: Mapping[int, Tensor]
    ) -> None:
        """Count the tokens of a micro-batch; padding left out.

        Args:
            first: block -> first choice of every token, ``[tokens]``.
            chosen: block -> routing map, ``[tokens, experts]`` bool.
        """
        self.blocks = sorted(first)
        ways = np.stack([first[block].cpu().numpy() for block in self.blocks])
        maps = np.stack([chosen[block].cpu().numpy() for block in self.blocks])
        groups = batch.group[0].cpu().numpy()
        media = np.isin(batch.input_ids[0].cpu().numpy(), self._markers)
        for number, group in enumerate(GROUPS):
            for kind, of_kind in zip(KINDS, (media, ~media), strict=True):
                where = (groups == number) & of_kind
                if where.any():
                    counted = self.counted.setdefault((group, kind), Counted())
                    counted.add(ways[:, where], maps[:, where].sum(1))

    def merge(self, other: Pathways) -> None:
        """Add what another rank counted."""
        self.blocks = self.blocks or other.blocks
        for key, theirs in other.counted.items():
            mine = self.counted.setdefault(key, Counted())
            mine.tokens += theirs.tokens
            mine.paths += theirs.paths
            if theirs.choices is not None:
                known = mine.choices is not None
                mine.choices = mine.choices + theirs.choices if known else theirs.choices

    def record(self) -> dict[str, Any]:
        """As it is written: the most travelled ways, and all choices."""
        found: dict[str, dict[str, Any]] = {}
        for (group, kind), counted in sorted(self.counted.items()):
            choices = [] if counted.choices is None else counted.choices.tolist()
            ways = sorted(counted.paths.items(), key=lambda item: (-item[1], item[0]))
            found.setdefault(group, {})[kind] = {
                "tokens": counted.tokens,
                "distinct": len(counted.paths),
                "paths": [[list(way), count] for way, count in ways[:MOST_WRITTEN]],
                "choices": choices,
            }
        return {"blocks": self.blocks, "groups": found}
