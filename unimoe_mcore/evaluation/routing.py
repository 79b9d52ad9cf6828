"""Which experts tokens go to: recorded from the routers of a forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from data_pipeline.reading.collate import MicroBatch
from unimoe_mcore.model.router_watch import RouterWatch
from unimoe_mcore.model.unimoe import UniMoEModel


class RoutingRecorder(RouterWatch):
    """Within its context, keeps the routing map and the first choices of every MoE layer and
    micro-batch.

    Layers are named by the transformer block they belong to. Covers the whole row of tokens, so
    it needs a layout without sequence parallelism, and this pipeline stage's layers only.
    """

    def __init__(self, chunks: Sequence[UniMoEModel], enabled: bool) -> None:
        super().__init__(chunks if enabled else ())
        blocks = [block for _, block, _ in self.routers]
        self._maps: dict[int, list[Tensor]] = {block: [] for block in blocks}
        self._firsts: dict[int, list[Tensor]] = {block: [] for block in blocks}

    def seen(self, block: int, router: TopKRouter, tokens: Tensor, output: Any) -> None:
        """Keep the routing map and the first choices of a micro-batch."""
        weights, chosen = output[0].detach(), output[1].detach().bool()
        self._maps[block].append(chosen)
        self._firsts[block].append(weights.masked_fill(~chosen, float("-inf")).argmax(-1))

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
