"""Sums over tokens by group of samples, which losses and accuracies are made of."""

from __future__ import annotations

import torch
from torch import Tensor

from data_pipeline.reading.collate import GROUPS, MicroBatch


def grouped_sums(losses: Tensor, batch: MicroBatch) -> Tensor:
    """Sum of the losses and number of label tokens for every group of samples.

    Args:
        losses: of every token, ``[1, tokens]`` fp32.

    Returns:
        ``[groups, 2]`` fp64: loss sum and label tokens.
    """
    weight = batch.loss_mask[0].double()
    group = batch.group[0].clamp(min=0)
    sums = torch.zeros(len(GROUPS), 2, dtype=torch.float64, device=losses.device)
    sums[:, 0].index_add_(0, group, losses.detach()[0].double() * weight)
    sums[:, 1].index_add_(0, group, weight)
    return sums


def mean_losses(sums: Tensor) -> dict[str, float]:
    """Loss over all label tokens, and over those of every group that has any.

    Args:
        sums: ``[groups, 2]``, added up over micro-batches and ranks.
    """
    total = sums.sum(0)
    losses = {"loss": (total[0] / total[1].clamp(min=1)).item()}
    for name, (loss, count) in zip(GROUPS, sums.tolist(), strict=True):
        if count:
            losses[f"loss/{name}"] = loss / count
    return losses
