"""What a router must know of every token, in the shape of Megatron's padding mask.

Megatron hands one boolean mask through all layers, cuts it under sequence parallelism with the
tokens and keeps it for recomputation. More planes of bits travel the same way, so that a router
never sees the marks of another micro-batch than its tokens', whatever the schedule.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from data_pipeline.reading.collate import GROUPS, MicroBatch

_GROUP_BITS = len(GROUPS).bit_length()
_SAMPLE_BITS = 16
LARGEST_ROW = 1 << _SAMPLE_BITS
"""Samples that a packed row can hold and still be told apart."""


@dataclass(frozen=True)
class Marks:
    """Marks of the tokens that a router sees.

    Attributes:
        valid: False at padding, ``[tokens]``.
        group: number in ``GROUPS`` of the token's sample, ``[tokens]``; 0 at padding, and
            everywhere if the marks were made without details.
        sample: number of the token's sample in its row, likewise.
    """

    valid: Tensor
    group: Tensor
    sample: Tensor


def token_marks(batch: MicroBatch, detailed: bool) -> Tensor:
    """The planes of a micro-batch, ``[planes, tokens]`` bool; the first is the padding mask.

    Raises:
        ValueError: more samples in a row than ``LARGEST_ROW``.
    """
    if not detailed:
        return batch.padding_mask
    if len(batch.samples) > LARGEST_ROW:
        raise ValueError(f"a row of {len(batch.samples)} samples, at most {LARGEST_ROW} are marked")
    code = (batch.sample.clamp(min=0) << _GROUP_BITS) | batch.group.clamp(min=0)
    places = torch.arange(_GROUP_BITS + _SAMPLE_BITS, device=code.device)
    return torch.cat([batch.padding_mask, (code >> places[:, None]).bitwise_and(1).bool()])


def read_marks(planes: Tensor | None, tokens: int, device: torch.device) -> Marks:
    """What ``token_marks`` made, as a router receives it.

    Args:
        planes: ``[tokens, planes]``; None if the model was called without a mask.
        tokens: that the router sees.
        device: of the tokens.
    """
    nothing = torch.zeros(tokens, dtype=torch.int64, device=device)
    if planes is None:
        return Marks(torch.ones_like(nothing, dtype=torch.bool), nothing, nothing)
    planes = planes.reshape(tokens, -1)
    valid = ~planes[:, 0]
    if planes.shape[1] == 1:
        return Marks(valid, nothing, nothing)
    powers = 1 << torch.arange(planes.shape[1] - 1, device=device)
    code = (planes[:, 1:] * powers).sum(1)
    return Marks(valid, code.bitwise_and((1 << _GROUP_BITS) - 1), code >> _GROUP_BITS)
