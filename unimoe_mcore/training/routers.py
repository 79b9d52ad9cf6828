"""All routers of a rank as one: told of every step before it, summed over all ranks after it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from data_pipeline.reading.collate import GROUPS, MicroBatch
from unimoe_mcore.config.model import BALANCING_LOSSES, MoEConfig, moe_blocks
from unimoe_mcore.config.recipe import Recipe
from unimoe_mcore.model.initialise import name_seed
from unimoe_mcore.model.router import BalancedRouter, RouterStep, Tally, routers
from unimoe_mcore.model.unimoe import UniMoEModel
from unimoe_mcore.runtime.devices import device

DEAD = 0.1
"""An expert is called dead in a step if its load is below this fraction of its even share."""


def balance_coefficient(step: int, moe: MoEConfig) -> float:
    """Coefficient of the balancing loss: linear from the first step to ``balance_until``.

    Args:
        step: from 0.
    """
    if not moe.balance_until:
        return moe.balance_coefficient
    left = max(0.0, 1 - step / moe.balance_until)
    return moe.balance_final + (moe.balance_coefficient - moe.balance_final) * left


class Routers:
    """The routers of this rank's model chunks.

    Attributes:
        routers: block -> router, of the layers on this rank.
    """

    def __init__(self, recipe: Recipe, chunks: Sequence[UniMoEModel]) -> None:
        language, self.moe = recipe.model.language, recipe.model.moe
        sparse = recipe.stage.kind == "moe"
        self._blocks = moe_blocks(self.moe.placement, language.blocks) if sparse else []
        self._experts = len(recipe.stage.experts)
        self._record = False
        self._every = recipe.trainer.router_every
        self._seed = recipe.trainer.seed
        self._chunks = chunks
        self.routers: dict[int, BalancedRouter] = {
            block: router
            for _, block, router in routers(chunks)
            if isinstance(router, BalancedRouter)
        }

    def begin(
        self,
        step: int,
        batches: Sequence[MicroBatch],
        tokens: int,
        samples: int,
    ) -> None:
        """Tell the routers of a step before its first micro-batch.

        Args:
            step: from 0.
            batches: this rank's micro-batches.
            tokens: of the global batch, without padding.
            samples: of the global batch.
        """
        state = RouterStep(
            balance=balance_coefficient(step, self.moe),
            z_loss=self.moe.z_loss,
            tokens=tokens,
            samples=samples,
            row=max([1, *(len(batch.samples) for batch in batches)]),
            record=self._every > 0 and (step + 1) % self._every == 0,
        )
        for router in self.routers.values():
            router.step = state
            router.begin()
        for chunk in self._chunks:
            chunk.detailed_marks = state.record or self.moe.balance == "sequence"
        if self.moe.jitter:
            # A pure function of step and rank, so that a resumed run needs no state for it.
            torch.manual_seed(name_seed(self._seed, f"jitter:{step}:{dist.get_rank()}"))
        self._record = state.record

    def end(self) -> dict[str, Any]:
        """Sum what all ranks counted; a collective if anything is to be known of it.

        Returns:
            Metrics (``router/...``) if this step is recorded.
        """
        for chunk in self._chunks:
            chunk.detailed_marks = False
        remembers = self.moe.balance in ("global", "bias")
        if not self._blocks or not (remembers or self._record):
            return {}
        tallies = [self._tally(block) for block in self._blocks]
        load = torch.stack([tally.load for tally in tallies]).double()
        sums = torch.stack([tally.sums for tally in tallies])
        # Every layer's tokens are counted once: on the data and tensor ranks of its stage.
        both = torch.cat([load.flatten(), sums.flatten()])
        dist.all_reduce(both)
        load, sums = both[: load.numel()].view_as(load), both[load.numel() :].view_as(sums)
        for block, total in zip(self._blocks, load.sum(1), strict=True):
            if block in self.routers:
                self.routers[block].end(total)
        if not self._record:
            return {}
        metrics = routing_metrics(self._blocks, load.cpu(), sums.cpu(), self.moe.top_k)
        absent = {"router/balance_loss": self.moe.balance not in BALANCING_LOSSES}
        absent |= {"router/z_loss": not self.moe.z_loss, "router/dropped": not self.moe.capacity}
        return {name: value for name, value in metrics.items() if not absent.get(name)}

    def _tally(self, block: int) -> Tally:
        """A layer's counts; none where it is on another pipeline stage."""
        tally = self.routers[block].tally if block in self.routers else None
        return tally or Tally.empty(self._experts, device())


def routing_metrics(
    blocks: Sequence[int], load: Tensor, sums: Tensor, top_k: int
) -> dict[str, Any]:
    """What a step's routing was like, by block.

    Args:
        blocks: the blocks with experts.
        load: tokens by group of their sample and expert, ``[blocks, groups, experts]`` fp64.
        sums: ``Tally.sums`` of every block, ``[blocks, sums]`` fp64.
        top_k: experts per token.

    Returns:
        ``router/load``: share of every expert; ``router/groups``: the same of every modality that
        the step has; ``router/load_entropy`` and ``router/entropy``: of the load, and the mean over
        tokens of that of the scores, as fractions of the largest, ``ln E``; ``router/dead``:
        ``block:expert`` of those below ``DEAD``; ``router/dropped``: share of the choices that were
        over the capacity; ``router/sent``: tokens that went to another rank, once for each expert;
        ``router/balance_loss`` and ``router/z_loss``, without their coefficients.
    """
    experts = load.shape[-1]
    largest = math.log(experts) or 1.0  # one expert: nothing to choose, both are 0
    choices = load.sum((1, 2))
    share = load.sum(1) / choices.clamp(min=1)[:, None]
    named = dict(zip(Tally.SUMS, sums.T, strict=True))

    def by_block(values: Tensor) -> dict[str, Any]:
        return {
            str(block): _rounded(value)
            for block, value in zip(blocks, values.tolist(), strict=True)
        }

    return {
        "router/load": by_block(share),
        "router/groups": {
            str(block): {
                name: _rounded((one / one.sum()).tolist())
                for name, one in zip(GROUPS, groups, strict=True)
                if one.sum()
            }
            for block, groups in zip(blocks, load, strict=True)
        },
        "router/load_entropy": by_block(torch.special.entr(share).sum(1) / largest),
        "router/entropy": by_block(named["entropy"] / (choices / top_k).clamp(min=1) / largest),
        "router/dead": [
            f"{block}:{expert}"
            for block, row in zip(blocks, share.tolist(), strict=True)
            for expert, one in enumerate(row)
            if one < DEAD / experts
        ],
        "router/dropped": by_block(named["dropped"] / choices.clamp(min=1)),
        "router/sent": by_block(named["sent"]),
        "router/balance_loss": by_block(named["balance"]),
        "router/z_loss": by_block(named["z"]),
    }


def _rounded(value: Any) -> Any:
    return [round(x, 6) for x in value] if isinstance(value, list) else round(value, 6)
