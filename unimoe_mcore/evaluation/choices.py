"""Which experts each token chose and how nearly it chose others: to tell flips from faults.

Two layouts add the same numbers in another order. A token whose last chosen and first not chosen
expert have almost equal logits may then go to the other one: a flip, after which losses differ by
more than summation order. This file finds such tokens by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from data_pipeline.reading.collate import MicroBatch
from unimoe_mcore.model.router_watch import RouterWatch
from unimoe_mcore.model.unimoe import UniMoEModel

Choices = dict[str, tuple[int, float]]
"""``block/dataset/sample/position`` -> the chosen experts as a sum of powers of two, and the
margin: logit of the last expert chosen less that of the first one not chosen."""


class ChoiceRecorder(RouterWatch):
    """Within its context, keeps what every router of this rank chose for every token.

    The model computes what it computes without it: logits are computed anew from the router's
    input.
    """

    def __init__(self, chunks: Sequence[UniMoEModel]) -> None:
        super().__init__(chunks)
        self._kept: dict[int, list[tuple[Tensor, Tensor]]] = {b: [] for _, b, _ in self.routers}

    @torch.no_grad()
    def seen(self, block: int, router: TopKRouter, tokens: Tensor, output: Any) -> None:
        """Keep the choices of a micro-batch and their margins."""
        logits = router.gating(tokens).float().flatten(0, -2)
        self._kept[block].append(chosen_and_margin(logits, output[1].detach().bool()))

    def choices(self, batches: Sequence[MicroBatch]) -> Choices:
        """What the tokens that this rank saw chose; padding left out.

        Args:
            batches: the micro-batches of the forward passes, in order.
        """
        found: Choices = {}
        for chunk, block, _ in self.routers:
            tensor = chunk.groups.tp
            parts = tensor.size() if chunk.config.sequence_parallel else 1  # of every row
            for batch, (chosen, margin) in zip(batches, self._kept[block], strict=True):
                first = len(chosen) * tensor.rank() if parts > 1 else 0
                names = _names(batch)[first : first + len(chosen)]
                # What is beyond the names is padding that the schedule lengthened a row by.
                for name, mask, gap in zip(names, chosen.tolist(), margin.tolist(), strict=False):
                    if name:
                        found[f"{block}/{name}"] = (mask, gap)
        return found


def chosen_and_margin(logits: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Chosen experts as a sum of powers of two, and the margin.

    Args:
        logits: ``[tokens, experts]``.
        chosen: of the same shape, bool.

    Returns:
        ``[tokens]`` int64 and ``[tokens]`` fp32.
    """
    powers = 2 ** torch.arange(logits.shape[1], device=logits.device)
    last = logits.masked_fill(~chosen, float("inf")).amin(1)
    first_not = logits.masked_fill(chosen, float("-inf")).amax(1)
    return (chosen.long() * powers).sum(1), last - first_not


def _names(batch: MicroBatch) -> list[str]:
    """``dataset/sample/position`` of every token of a row, empty at padding."""
    samples = [f"{sample.dataset}/{sample.key}" for sample in batch.samples]
    numbers, positions = batch.sample[0].tolist(), batch.position_ids[0].tolist()
    return [
        f"{samples[number]}/{position}" if number >= 0 else ""
        for number, position in zip(numbers, positions, strict=True)
    ]


@dataclass(frozen=True)
class Flip:
    """A token that goes to other experts than in the reference.

    Attributes:
        token: ``block/dataset/sample/position``.
        margin: the larger of the two runs' margins: how far from a tie it was.
    """

    token: str
    margin: float


def flips(ours: Mapping[str, Any], reference: Mapping[str, Any]) -> list[Flip]:
    """All flips, the one with the largest margin first.

    Raises:
        ValueError: if the runs did not see the same tokens.
    """
    if ours.keys() != reference.keys():
        raise ValueError(
            f"other tokens than in the reference: {len(ours.keys() - reference.keys())} more, "
            f"{len(reference.keys() - ours.keys())} fewer"
        )
    found = [
        Flip(token, max(margin, reference[token][1]))
        for token, (chosen, margin) in ours.items()
        if chosen != reference[token][0]
    ]
    return sorted(found, key=lambda flip: -flip.margin)
