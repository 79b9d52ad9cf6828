"""Which experts the tokens of a question and of its answer went to."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from unimoe_mcore.model.router_watch import RouterWatch
from unimoe_mcore.model.unimoe import UniMoEModel

Shares = dict[str, list[float]]
"""Block -> share of the choices that each expert got."""


class ExpertShares(RouterWatch):
    """Within its context, counts the experts that every router chooses.

    The place that says an answer's first token is the question's last one; it counts for both.
    """

    def __init__(self, model: UniMoEModel) -> None:
        super().__init__([model])
        self._question: dict[int, Tensor] = {}
        self._answer: dict[int, Tensor] = {}
        self._latest: dict[int, Tensor] = {}

    def seen(self, block: int, router: TopKRouter, tokens: Tensor, output: Any) -> None:
        """Count a question's tokens, and keep the latest place."""
        chosen = output[1].detach().long()
        # A sequence comes whole first; then by its next token, or whole again.
        self._question.setdefault(block, chosen.sum(0))
        self._latest[block] = chosen[-1]

    def count_answer(self) -> None:
        """Count the latest place: what it said is of the answer, and no end token."""
        for block, chosen in self._latest.items():
            self._answer[block] = self._answer.get(block, 0) + chosen

    @property
    def question(self) -> Shares:
        """Of all tokens of the question, its media's included."""
        return _shares(self._question)

    @property
    def answer(self) -> Shares:
        """Of the places at which the answer's tokens were said; empty if there are none."""
        return _shares(self._answer)


def _shares(counts: dict[int, Tensor]) -> Shares:
    found = {}
    for block, count in sorted(counts.items()):
        shares = count.double() / torch.clamp(count.sum(), min=1)
        found[str(block)] = [round(share, 6) for share in shares.tolist()]
    return found
