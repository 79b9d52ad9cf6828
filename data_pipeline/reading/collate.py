"""From rendered samples to one packed micro-batch of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from data_pipeline.reading.medium import MODALITIES, Medium
from data_pipeline.reading.sample import GROUPS, Sample


@dataclass
class MicroBatch:
    """Several sequences packed into one row; attention stays inside each of them.

    Attributes:
        input_ids: ``[1, tokens]``; a medium's places hold its marker's id.
        labels: the next token of the same sequence, ``[1, tokens]``; 0 where none is learnt.
        loss_mask: 1.0 where the label counts, ``[1, tokens]`` float32.
        position_ids: position within the sequence, ``[1, tokens]``.
        padding_mask: True at padding, ``[1, tokens]``.
        group: number in ``GROUPS`` of the token's sample, ``[1, tokens]`` int64; -1 at padding.
        sample: number of the token's sample in ``samples``, ``[1, tokens]``; -1 at padding.
        cu_seqlens: cumulative lengths of the sequences, padding's included, ``[n + 1]`` int32.
        max_seqlen: length of the longest sequence, tokens.
        media: media by modality, in the order in which their markers appear.
        samples: the samples, in order.
        pad: token id of padding.
    """

    input_ids: Tensor
    labels: Tensor
    loss_mask: Tensor
    position_ids: Tensor
    padding_mask: Tensor
    group: Tensor
    sample: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    media: dict[str, list[Medium]] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)
    pad: int = 0

    def to(self, device: torch.device) -> MicroBatch:
        """The same micro-batch with its tensors on a device; media stay where they are."""
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True)
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        return replace(self, **moved)

    def lengthened(self, length: int) -> MicroBatch:
        """The same micro-batch with padding up to ``length`` tokens."""
        before = self.input_ids.shape[1]
        if before == length:
            return self
        filled = {
            "input_ids": self.pad,
            "labels": 0,
            "loss_mask": 0.0,
            "position_ids": 0,
            "padding_mask": True,
            "group": -1,
            "sample": -1,
        }
        rows: dict[str, Any] = {
            name: torch.nn.functional.pad(getattr(self, name), (0, length - before), value=value)
            for name, value in filled.items()
        }
        ends = _padding_ends(before, length, self.max_seqlen)
        more = self.cu_seqlens.new_tensor(ends)
        return replace(self, **rows, cu_seqlens=torch.cat([self.cu_seqlens, more]))

    @property
    def label_tokens(self) -> int:
        """Number of tokens that the loss counts."""
        return int(self.loss_mask.sum().item())

    @property
    def tokens(self) -> int:
        """Number of tokens without padding."""
        return int((~self.padding_mask).sum().item())


def collate(samples: Sequence[Sample], pad_id: int, multiple: int) -> MicroBatch:
    """Pack samples into one row whose length is a multiple of ``multiple`` tokens.

    Lengths are rounded up so that kernels meet few different shapes (and sequence parallelism
    can split the row). The padding is cut into sequences no longer than the longest sample, so
    that it costs little attention. No samples give a row of ``multiple`` padding tokens.
    """
    used = sum(len(s.tokens.ids) for s in samples)
    length = max(1, -(-used // multiple)) * multiple
    longest = max((len(s.tokens.ids) for s in samples), default=min(length, 64))
    batch = MicroBatch(
        input_ids=torch.full((1, length), pad_id, dtype=torch.int64),
        labels=torch.zeros((1, length), dtype=torch.int64),
        loss_mask=torch.zeros((1, length), dtype=torch.float32),
        position_ids=torch.zeros((1, length), dtype=torch.int64),
        padding_mask=torch.ones((1, length), dtype=torch.bool),
        group=torch.full((1, length), -1, dtype=torch.int64),
        sample=torch.full((1, length), -1, dtype=torch.int64),
        cu_seqlens=torch.zeros(1, dtype=torch.int32),
        max_seqlen=longest,
        media={modality: [] for modality in MODALITIES},
        samples=list(samples),
        pad=pad_id,
    )
    ends, start = [0], 0
    for number, sample in enumerate(samples):
        ids = torch.tensor(sample.tokens.ids, dtype=torch.int64)
        learn = torch.tensor(sample.tokens.learn, dtype=torch.float32)
        end = start + len(ids)
        batch.input_ids[0, start:end] = ids
        batch.labels[0, start : end - 1] = ids[1:]
        batch.loss_mask[0, start : end - 1] = learn[1:]
        batch.position_ids[0, start:end] = torch.arange(len(ids))
        batch.padding_mask[0, start:end] = False
        batch.group[0, start:end] = GROUPS.index(sample.group)
        batch.sample[0, start:end] = number
        for medium in sample.media:
            batch.media[medium.modality].append(medium)
        ends.append(end)
        start = end
    batch.labels *= batch.loss_mask.bool()
    ends += _padding_ends(start, length, longest)
    batch.cu_seqlens = torch.tensor(ends, dtype=torch.int32)
    return batch


def _padding_ends(start: int, length: int, longest: int) -> list[int]:
    """Ends of the sequences that padding from ``start`` to ``length`` is cut into."""
    return [min(length, end) for end in range(start + longest, length + longest, longest)]
