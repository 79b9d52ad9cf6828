"""Some texts of many samples: what stands for all of them, so that large sets are quick to see."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from data_pipeline.conversation.original import learnt_otherwise
from data_pipeline.conversation.template import text_tokens
from data_pipeline.conversation.tokenizer import TextTokenizer
from data_pipeline.reading.records import RecordReader
from data_pipeline.shards.index import ShardIndex
from data_pipeline.shards.schema import HUMAN, PLACEHOLDERS, Turn, parse_sample

MOST_TEXTS = 4000
"""Records that are read of one combination of one dataset in one split."""

CHARACTERS_PER_TOKEN = 4
"""Where there is no tokenizer. It is usual for English; the quickstart's own has 3.8."""


@dataclass(frozen=True)
class Texts:
    """The conversations of some samples, which stand for all samples of their shards.

    Attributes:
        rows: rows of the samples that were read, ascending, ``[read]``.
        count: number of all samples.
        conversations: of those that were read.
    """

    rows: np.ndarray
    count: int
    conversations: list[tuple[Turn, ...]]

    def measure(self, what: Callable[[Sequence[Turn]], int]) -> np.ndarray:
        """A number for every conversation that was read, ``[read]`` int64."""
        return np.array([what(each) for each in self.conversations], dtype=np.int64)

    def spread(self, measured: np.ndarray) -> np.ndarray:
        """A number for every sample, ``[count]``: that of the sample that stands for it."""
        return np.repeat(measured, np.diff(_cuts(self.count, len(measured))))


def read_texts(shards: Sequence[ShardIndex], reader: RecordReader) -> Texts:
    """Read at most ``MOST_TEXTS`` records, one out of each of as many equal stretches of samples.

    Of shards that are elsewhere only the first one is read, since shards are fetched whole.

    Args:
        shards: of one dataset, at least one.
        reader: of their records.

    Raises:
        DataError: a shard cannot be read, or a record is damaged or not valid.
    """
    within = shards[:1] if shards[0].url else shards
    starts = np.cumsum([0, *(len(shard) for shard in within)])
    rows = _picked(int(starts[-1]))
    conversations = []
    for number, row in zip(np.searchsorted(starts, rows, side="right") - 1, rows, strict=True):
        shard = within[number]
        sample = shard.samples[int(row - starts[number])]
        record = reader.record_bytes(shard, sample)
        conversations.append(parse_sample(record, f"{shard.path.name}:{sample.key}").turns)
    return Texts(rows, sum(len(shard) for shard in shards), conversations)


def _cuts(count: int, parts: int) -> np.ndarray:
    """Where ``count`` samples are cut into ``parts`` stretches, ``[parts + 1]`` int64."""
    return np.arange(parts + 1, dtype=np.int64) * count // parts


def _picked(count: int) -> np.ndarray:
    """One row of each stretch, at random, so that no regular order of the samples is hit upon."""
    cuts = _cuts(count, min(count, MOST_TEXTS))
    rng = np.random.Generator(np.random.PCG64(0))
    return rng.integers(cuts[:-1], cuts[1:])


def characters(turns: Sequence[Turn]) -> int:
    """Characters of a conversation, without placeholders."""
    return sum(len(_plain(turn)) for turn in turns)


def token_counter(tokenizer: TextTokenizer | None) -> Callable[[Sequence[Turn]], int]:
    """Counts a conversation's tokens without its media; by its characters without a tokenizer."""
    if tokenizer is None:
        return _estimated_tokens
    return lambda turns: text_tokens(_conversation(turns), tokenizer)


def otherwise_counter(tokenizer: TextTokenizer | None) -> Callable[[Sequence[Turn]], int]:
    """1 for a conversation that the published code learns otherwise, if it has this template."""
    if tokenizer is None:
        return lambda turns: 0
    return lambda turns: bool(learnt_otherwise(_conversation(turns), tokenizer.template))


def _conversation(turns: Sequence[Turn]) -> list[dict[str, str]]:
    return [{"from": turn.speaker, "value": turn.text} for turn in turns]


def _estimated_tokens(turns: Sequence[Turn]) -> int:
    """One token opens a conversation, and one ends every turn; characters make the others."""
    return 1 + sum(1 + -(-len(_plain(turn)) // CHARACTERS_PER_TOKEN) for turn in turns)


def _plain(turn: Turn) -> str:
    text = turn.text
    if turn.speaker == HUMAN:
        for placeholder in PLACEHOLDERS.values():
            text = text.replace(placeholder, "")
    return text.strip()
