"""What is done to samples of a source that somebody who trains on it should know of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from data_pipeline.planning.plan import Source


class Remarkable(NamedTuple):
    """How many samples of a source are not learnt as they stand, or not as the original does.

    Attributes:
        cut: longer than ``data.sample_tokens``: what is over is cut off, or they are left out.
        overfull: those of them whose media alone leave no room, so that they are left out.
        otherwise: whose answers the published code would not learn (``conversation.original``).
    """

    cut: int = 0
    overfull: int = 0
    otherwise: int = 0


def remarks(sources: Sequence[Source], found: Sequence[Remarkable], most: int) -> Iterator[str]:
    """A sentence for each source and kind of which there are some.

    Args:
        sources: the sources.
        found: numbers of each.
        most: ``data.sample_tokens``.
    """
    for source, number in zip(sources, found, strict=True):
        name, count = f"{source.dataset} ({source.combination})", f"{source.count:,}"
        if number.cut:
            yield (
                f"{name}: {number.cut:,} of {count} samples are longer than "
                f"data.sample_tokens={most}: their ends are cut off behind their last medium; "
                f"where that leaves nothing of an answer they go to quarantine "
                f"({number.overfull:,} for their media alone)."
            )
        if number.otherwise:
            yield (
                f"{name}: {number.otherwise:,} of {count} samples are learnt whose answers "
                "Uni-MoE's published code masks or finds elsewhere: their text spells a structural "
                "token or ASSISTANT:, or a turn is empty."
            )
