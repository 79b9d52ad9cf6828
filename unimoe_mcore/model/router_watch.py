"""What routers put out while a model runs, seen from outside of it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from types import TracebackType
from typing import Any, Self

from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from unimoe_mcore.model.router import routers
from unimoe_mcore.model.unimoe import UniMoEModel


class RouterWatch:
    """Within its context, ``seen`` is called whenever a router of this rank has chosen.

    Attributes:
        routers: chunk, block and router, of all that are watched.
    """

    def __init__(self, chunks: Sequence[UniMoEModel]) -> None:
        self.routers = list(routers(chunks))
        self._hooks: list[RemovableHandle] = []

    def seen(self, block: int, router: TopKRouter, tokens: Tensor, output: Any) -> None:
        """What a router chose.

        Args:
            block: number of its transformer block.
            tokens: what it was given.
            output: weights and choices, ``[tokens, experts]`` each.
        """
        raise NotImplementedError

    def __enter__(self) -> Self:
        for _, block, router in self.routers:
            self._hooks.append(router.register_forward_hook(partial(self._hook, block)))
        return self

    def _hook(self, block: int, router: Any, inputs: tuple[Any, ...], output: Any) -> None:
        self.seen(block, router, inputs[0], output)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for hook in self._hooks:
            hook.remove()
