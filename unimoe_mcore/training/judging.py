"""Teacher-forced answers: the loss of every token with a label, and whether it would be said."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from megatron.core.utils import unwrap_model
from torch import Tensor

from data_pipeline.reading.collate import MicroBatch
from unimoe_mcore.runtime.devices import device
from unimoe_mcore.training.module import TrainModule
from unimoe_mcore.training.pipeline import run_schedule


@dataclass(frozen=True)
class Judgement:
    """Teacher-forced answers of one micro-batch.

    Attributes:
        losses: of every token with a label, 0 elsewhere, ``[tokens]`` fp32.
        correct: for every token with a label, whether the likeliest next token is the label,
            ``[tokens]``. Where all tokens of an answer are, greedy decoding gives that answer.
        likeliest: for every token with a label, the likeliest next token, ``[tokens]`` int64.
    """

    losses: Tensor
    correct: Tensor
    likeliest: Tensor


@torch.no_grad()
def judge(module: TrainModule, batches: Sequence[MicroBatch]) -> list[Judgement]:
    """Loss and correctness of every token of every micro-batch, on the last stage.

    Other pipeline stages get an empty list. Every rank has equally many micro-batches.
    """
    for chunk in module.wrapped:
        chunk.eval()
    found: list[Judgement] = run_schedule(
        module, batches, _forward, forward_only=True, collect_non_loss_data=True
    )
    # The schedule may have lengthened rows; stages before the last have found nothing.
    lengths = [batch.loss_mask.shape[1] for batch in batches]
    return [
        Judgement(*(each[:length] for each in vars(judgement).values()))
        for judgement, length in zip(found, lengths, strict=False)
    ]


def _forward(iterator: Iterator[MicroBatch], model: Any) -> tuple[Tensor, Any]:
    batch = next(iterator).to(device())
    places = unwrap_model(model).answer_places(batch)
    return model(batch, with_loss=False), partial(_judge, batch, places)


def _judge(
    batch: MicroBatch, places: Tensor, logits: Tensor, non_loss_data: bool = True
) -> Judgement:
    whole = gather_from_tensor_model_parallel_region(logits)[0].float()
    labels = batch.labels[0, places]
    losses = torch.nn.functional.cross_entropy(whole, labels, reduction="none")
    row, likeliest = torch.zeros_like(batch.loss_mask[0]), whole.argmax(-1)
    return Judgement(
        row.index_copy(0, places, losses),
        row.index_copy(0, places, (likeliest == labels).float()).bool(),
        torch.zeros_like(batch.labels[0]).index_copy(0, places, likeliest),
    )
