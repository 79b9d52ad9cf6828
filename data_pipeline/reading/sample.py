"""What reading a row of the catalogue yields: a sample, or the reason why there is none."""

from __future__ import annotations

from dataclasses import dataclass

from data_pipeline.conversation.template import Rendered
from data_pipeline.modalities import MODALITIES
from data_pipeline.reading.medium import Medium

GROUPS = (*MODALITIES, "text")
"""What losses and routing are reported by: a sample's first modality, or text."""

KINDS = ("broken", "slow", "large", "inconsistent", "crashed")
"""What can be wrong with a sample: its bytes are damaged; decoding it takes too long; it is larger
than allowed; its text, its media and the plan disagree; decoding it ends the process."""


@dataclass(frozen=True)
class Sample:
    """A sample ready to be packed.

    Attributes:
        key: its key in the shard.
        dataset: its dataset.
        group: one of ``GROUPS``.
        tokens: the conversation as tokens.
        media: its media in the order of their markers.
    """

    key: str
    dataset: str
    group: str
    tokens: Rendered
    media: tuple[Medium, ...] = ()


@dataclass(frozen=True)
class BrokenSample:
    """A sample that cannot be used; its place in the step stays empty.

    Attributes:
        kind: one of ``KINDS``.
        dataset: its dataset.
        shard: file name of its tar.
        key: its key in the shard.
        reason: what is wrong, in words.
    """

    kind: str
    dataset: str
    shard: str
    key: str
    reason: str
