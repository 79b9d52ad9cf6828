"""From a conversation to token ids and labels."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from data_pipeline.conversation.tokenizer import TextTokenizer
from data_pipeline.errors import DataError
from data_pipeline.modalities import MODALITIES

_MARKER = re.compile("(" + "|".join(f"<{m}>" for m in MODALITIES) + ")")


@dataclass(frozen=True)
class Rendered:
    """One conversation as tokens.

    Attributes:
        ids: token ids, media markers repeated once per language-model token, ``[tokens]``.
        learn: whether a token is part of an answer (its end token included), ``[tokens]``.
    """

    ids: list[int]
    learn: list[bool]


def text_tokens(conversations: Sequence[Mapping[str, str]], tokenizer: TextTokenizer) -> int:
    """Tokens of a conversation without those of its media."""
    return sum(1 for _ in _walk(conversations, tokenizer) if not isinstance(_, _MarkerOf))


def render(
    conversations: Sequence[Mapping[str, str]],
    tokenizer: TextTokenizer,
    media_tokens: Mapping[str, Sequence[int]],
) -> Rendered:
    """Lay a conversation out by the tokenizer's chat template.

    A conversation that ends with a question becomes the prompt that its answer follows.

    Args:
        conversations: alternating turns ``{"from": "human" | "gpt", "value": text}``; the k-th
            ``<image>`` stands for the k-th image, and so on per modality.
        tokenizer: of the base.
        media_tokens: for every modality the language-model tokens of each of its media, in order.

    Raises:
        DataError: if there are more or fewer markers than media.
    """
    ids: list[int] = []
    learn: list[bool] = []
    used = dict.fromkeys(MODALITIES, 0)
    for token, learned in _walk_learned(conversations, tokenizer):
        if isinstance(token, _MarkerOf):
            modality = token.modality
            if modality not in tokenizer.markers:
                raise DataError(f"the base's tokenizer is older than <{modality}>: make another")
            have = media_tokens.get(modality, ())
            if used[modality] >= len(have):
                raise DataError(f"more <{modality}> markers than media ({len(have)})")
            count = have[used[modality]]
            used[modality] += 1
            ids += [tokenizer.markers[modality]] * count
            learn += [False] * count
        else:
            ids.append(token)
            learn.append(learned)
    for modality, counts in media_tokens.items():
        if used[modality] != len(counts):
            raise DataError(f"{len(counts)} {modality} media but {used[modality]} markers")
    return Rendered(ids, learn)


@dataclass(frozen=True)
class _MarkerOf:
    modality: str


def _walk(
    conversations: Sequence[Mapping[str, str]], tokenizer: TextTokenizer
) -> Iterator[int | _MarkerOf]:
    return (token for token, _ in _walk_learned(conversations, tokenizer))


def _walk_learned(
    conversations: Sequence[Mapping[str, str]], tokenizer: TextTokenizer
) -> Iterator[tuple[int | _MarkerOf, bool]]:
    yield from _given(tokenizer.begin)
    for place, turn in enumerate(conversations):
        if turn["from"] == "human":
            yield from _given(tokenizer.between if place else [])
            yield from _given(tokenizer.before_question)
            for piece in _MARKER.split(turn["value"]):
                if _MARKER.fullmatch(piece):
                    yield _MarkerOf(piece[1:-1]), False
                else:
                    yield from _given(tokenizer.encode(piece.strip()))
            yield from _given(tokenizer.after_question)
        else:
            yield from ((token, True) for token in tokenizer.encode(turn["value"]))
            yield tokenizer.end, True


def _given(ids: Sequence[int]) -> Iterator[tuple[int, bool]]:
    """Tokens that are not learnt."""
    return ((token, False) for token in ids)
