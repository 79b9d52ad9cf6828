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
    walk = _walk(conversations, tokenizer)
    return sum(not isinstance(token, _MarkerOf) for token, _ in walk)


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
    for token, learned in _walk(conversations, tokenizer):
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


Token = tuple[int | _MarkerOf, bool]
"""A token or a medium's place, and whether it is learnt."""


def _walk(conversations: Sequence[Mapping[str, str]], tokenizer: TextTokenizer) -> Iterator[Token]:
    walk = _in_whole if tokenizer.template.whole else _in_parts
    return walk(conversations, tokenizer)


def _in_parts(
    conversations: Sequence[Mapping[str, str]], tokenizer: TextTokenizer
) -> Iterator[Token]:
    """Every part of the template and of a turn is tokenised by itself."""
    template = tokenizer.template
    yield from _given(tokenizer.structure(template.begin))
    for place, turn in enumerate(conversations):
        if turn["from"] == "human":
            yield from _given(tokenizer.structure(template.between if place else ""))
            yield from _given(tokenizer.structure(template.before_question))
            for piece in _MARKER.split(turn["value"]):
                if _MARKER.fullmatch(piece):
                    yield _MarkerOf(piece[1:-1]), False
                else:
                    yield from _given(tokenizer.encode(piece.strip()))
            yield from _given(tokenizer.structure(template.after_question))
        else:
            yield from ((token, True) for token in tokenizer.encode(turn["value"]))
            yield tokenizer.end, True


def _in_whole(
    conversations: Sequence[Mapping[str, str]], tokenizer: TextTokenizer
) -> Iterator[Token]:
    """Text up to the next structural token or marker is tokenised at once, as it stands."""
    template = tokenizer.template
    text = ""  # since the last structural token or marker
    for place, turn in enumerate(conversations):
        if turn["from"] == "human":
            before, after = template.around(turn["value"])
            for piece in template.pieces((template.between if place else template.begin) + before):
                if piece in template.special:
                    yield from _given(tokenizer.encode(text) + tokenizer.structure(piece))
                    text = ""
                else:
                    text += piece
            for piece in _MARKER.split(turn["value"]):
                if _MARKER.fullmatch(piece):
                    yield from _given(tokenizer.encode(text))
                    yield _MarkerOf(piece[1:-1]), False
                    text = ""
                else:
                    text += piece
            text += after
        elif turn["value"]:
            asked = len(tokenizer.encode(text))
            ids = tokenizer.encode(text + template.before_answer + turn["value"])
            yield from ((token, number >= asked) for number, token in enumerate(ids))
            yield tokenizer.end, True
            text = ""
    yield from _given(tokenizer.encode(text))


def _given(ids: Sequence[int]) -> Iterator[Token]:
    """Tokens that are not learnt."""
    return ((token, False) for token in ids)
