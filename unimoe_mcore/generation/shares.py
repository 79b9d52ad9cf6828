"""Which experts the tokens of a question and of its answer went to."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from unimoe_mcore.model.router import routers
from unimoe_mcore.model.unimoe import UniMoEModel

Shares = dict[str, list[float]]
"""Block -> share of the choices that each expert got."""


class ExpertShares:
    """Within its context, counts the experts that every router chooses.

    The place that says an answer's first token is the question's last one; it counts for both.
    """

    def __init__(self, model: UniMoEModel) -> None:
        self._routers = {block: router for _, block, router in routers([model])}
        self._question: dict[int, Tensor] = {}
        self._answer: dict[int, Tensor] = {}
        self._latest: dict[int, Tensor] = {}
        self._hooks: list[RemovableHandle] = []

    def __enter__(self) -> ExpertShares:
        for block, router in self._routers.items():

            def count(_: Any, __: Any, output: tuple[Tensor, Tensor], block: int = block) -> None:
                chosen = output[1].detach().long()
                # A sequence comes whole first; then by its next token, or whole again.
                self._question.setdefault(block, chosen.sum(0))
                self._latest[block] = chosen[-1]

            self._hooks.append(router.register_forward_hook(count))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for hook in self._hooks:
            hook.remove()

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
