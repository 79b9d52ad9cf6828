"""Which experts tokens go to: recorded from the routers of a forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from data_pipeline.reading.collate import MicroBatch
from unimoe_mcore.model.router import routers
from unimoe_mcore.model.unimoe import UniMoEModel


class RoutingRecorder:
    """Within its context, keeps the routing map and the first choices of every MoE layer and
    micro-batch.

    Layers are named by the transformer block they belong to. Covers the whole row of tokens, so
    it needs a layout without sequence parallelism, and this pipeline stage's layers only.
    """

    def __init__(self, chunks: Sequence[UniMoEModel], enabled: bool) -> None:
        self._maps: dict[int, list[Tensor]] = {}
        self._firsts: dict[int, list[Tensor]] = {}
        self._routers: dict[int, Any] = {}
        self._hooks: list[RemovableHandle] = []
        if not enabled:
            return
        self._routers = {block: router for _, block, router in routers(chunks)}

    def __enter__(self) -> RoutingRecorder:
        for block, router in self._routers.items():
            kept = self._maps.setdefault(block, []), self._firsts.setdefault(block, [])

            def keep(_: Any, __: Any, output: tuple[Tensor, Tensor], kept: Any = kept) -> None:
                weights, chosen = output[0].detach(), output[1].detach().bool()
                kept[0].append(chosen)
                kept[1].append(weights.masked_fill(~chosen, float("-inf")).argmax(-1))

            self._hooks.append(router.register_forward_hook(keep))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for hook in self._hooks:
            hook.remove()

    def choices(self, microbatch: int) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """First choices ``[tokens]`` and routing maps ``[tokens, experts]`` by block."""
        firsts = {block: kept[microbatch] for block, kept in self._firsts.items()}
        return firsts, {block: kept[microbatch] for block, kept in self._maps.items()}

    def counts(self, microbatch: int, batch: MicroBatch) -> dict[str, Tensor]:
        """Tokens of every sample of a micro-batch that each expert got, by block.

        Returns:
            Block number -> ``[samples, experts]`` int64.
        """
        samples = len(batch.samples)
        place = batch.sample[0].cpu() % (samples + 1)  # padding, -1, is counted apart
        found = {}
        for block, maps in sorted(self._maps.items()):
            chosen = maps[microbatch].long().cpu()
            counts = torch.zeros(samples + 1, chosen.shape[1], dtype=torch.int64)
            found[str(block)] = counts.index_add_(0, place, chosen)[:samples]
        return found
