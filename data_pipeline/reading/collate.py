"""From rendered samples to one packed micro-batch of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_pipeline.modalities import MODALITIES
from data_pipeline.planning.load import Load
from data_pipeline.reading.medium import Medium
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
        load: planned and actual work, for a micro-batch of a plan.
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
    load: Load | None = None

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
    lengths = np.array([len(s.tokens.ids) for s in samples], dtype=np.int64)
    used, ends = int(lengths.sum()), np.cumsum(lengths)
    length = max(1, -(-used // multiple)) * multiple
    longest = int(lengths.max(initial=0)) if len(lengths) else min(length, 64)
    ids = np.full(length, pad_id, dtype=np.int64)
    ids[:used] = np.fromiter(chain.from_iterable(s.tokens.ids for s in samples), np.int64, used)
    learn = np.zeros(length + 1, dtype=np.float32)
    learn[:used] = np.fromiter(chain.from_iterable(s.tokens.learn for s in samples), bool, used)
    learn[ends] = 0.0  # what follows a sample's last token is another's first
    labels = np.zeros(length, dtype=np.int64)
    labels[:-1] = ids[1:]
    labels[learn[1:] == 0] = 0

    def of_samples(values: np.ndarray, padding: int) -> np.ndarray:
        """Each sample's value at all of its tokens."""
        return np.concatenate([values.repeat(lengths), np.full(length - used, padding)])

    starts = of_samples(ends - lengths, 0)
    positions = np.arange(length) - starts
    positions[used:] = 0
    groups = np.array([GROUPS.index(s.group) for s in samples], dtype=np.int64)
    media: dict[str, list[Medium]] = {modality: [] for modality in MODALITIES}
    for medium in chain.from_iterable(sample.media for sample in samples):
        media[medium.modality].append(medium)
    sequences = [0, *ends.tolist(), *_padding_ends(used, length, longest)]
    return MicroBatch(
        input_ids=_row(ids),
        labels=_row(labels),
        loss_mask=_row(learn[1:]),
        position_ids=_row(positions),
        padding_mask=_row(np.arange(length) >= used),
        group=_row(of_samples(groups, -1)),
        sample=_row(of_samples(np.arange(len(samples)), -1)),
        cu_seqlens=torch.tensor(sequences, dtype=torch.int32),
        max_seqlen=longest,
        media=media,
        samples=list(samples),
        pad=pad_id,
    )


def _padding_ends(start: int, length: int, longest: int) -> list[int]:
    """Ends of the sequences that padding from ``start`` to ``length`` is cut into."""
    return [min(length, end) for end in range(start + longest, length + longest, longest)]


def _row(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values)[None]
