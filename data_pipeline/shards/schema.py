"""What a sample is: a conversation with placeholders, and the media that take their places.

In the tar a sample is ``<key>.json`` and one member ``<key>.<member>`` per medium::

    {"key": "img_group-000123", "dataset": "img_group",
     "conversations": [{"from": "human", "value": "<image>\\nWhich kind of thing is this?"},
                       {"from": "gpt", "value": "Animals"}],
     "media": [{"modality": "image", "member": "0.jpg"}]}

The k-th placeholder of a modality takes the k-th medium of that modality.
"""

from __future__ import annotations

import json
import re
import string
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from data_pipeline.errors import DataError
from data_pipeline.modalities import MODALITIES

HUMAN, ASSISTANT = "human", "gpt"
PLACEHOLDERS = {modality: f"<{modality}>" for modality in MODALITIES}
MAX_RECORD_BYTES = 1024**2
"""Largest JSON record that is parsed, bytes."""
MAX_MEDIUM_BYTES = 512 * 1024**2
"""Largest medium that may lie in a shard, bytes."""
KEY_CHARACTERS = string.ascii_letters + string.digits + "_-"
MAX_KEY = 80
"""Longest key, characters."""
MIXED = "mixed"
"""Stands for the combination of a shard that has several."""
DATASET_NAME = re.compile(r"[A-Za-z0-9_-]{1,40}")
MEMBER_NAME = re.compile(r"[0-9]{1,3}\.[a-z0-9]{1,8}")

_PLACEHOLDER = re.compile("|".join(PLACEHOLDERS.values()))
_KEY = re.compile(f"[{KEY_CHARACTERS}]{{1,{MAX_KEY}}}")


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of a conversation.

    Attributes:
        speaker: ``human`` or ``gpt``.
        text: what is said; a human turn may hold placeholders and may be empty.
    """

    speaker: str
    text: str


@dataclass(frozen=True, slots=True)
class MediumRef:
    """A medium that belongs to a sample.

    Attributes:
        modality: one of ``MODALITIES``.
        member: the tar member's name after ``<key>.``, such as ``0.jpg``.
    """

    modality: str
    member: str


@dataclass(frozen=True, slots=True)
class Sample:
    """One sample, without the bytes of its media.

    Attributes:
        key: unique in its dataset; letters, digits, ``_`` and ``-``.
        dataset: name of the dataset that it belongs to.
        turns: alternating turns; the first is ``human``, the last ``gpt``.
        media: its media in the order of their placeholders, per modality.
    """

    key: str
    dataset: str
    turns: tuple[Turn, ...]
    media: tuple[MediumRef, ...] = ()

    @property
    def combination(self) -> str:
        """The modalities in this sample, such as ``image+text``."""
        return combination_of(medium.modality for medium in self.media)

    def to_json(self) -> bytes:
        """The record as it lies in the tar, UTF-8."""
        record = {
            "key": self.key,
            "dataset": self.dataset,
            "conversations": [{"from": turn.speaker, "value": turn.text} for turn in self.turns],
            "media": [{"modality": m.modality, "member": m.member} for m in self.media],
        }
        return json.dumps(record, ensure_ascii=False).encode("utf-8")


def combination_of(modalities: Iterable[str]) -> str:
    """Name of a set of modalities: in the order of ``MODALITIES``, joined by ``+``, then text."""
    present = set(modalities)
    return "+".join([*(each for each in MODALITIES if each in present), "text"])


def modalities_of(combination: str) -> tuple[str, ...]:
    """The modalities that a combination's name lists, without text.

    Raises:
        DataError: it is not the name of a combination.
    """
    names = tuple(combination.split("+")[:-1])
    if combination_of(names) != combination or len(set(names)) != len(names):
        raise DataError(
            f"'{combination}' is no combination: expected some of {', '.join(MODALITIES)} in this "
            "order, joined by '+', with 'text' at the end"
        )
    return names


def parse_sample(data: bytes, source: str) -> Sample:
    """Read a record and validate it.

    Args:
        data: the JSON member's bytes.
        source: ``shard.tar:member``, for messages.

    Raises:
        DataError: the record is not valid; the message names source and key.
    """
    if len(data) > MAX_RECORD_BYTES:
        raise DataError(f"{source}: a record of {len(data)} bytes exceeds {MAX_RECORD_BYTES}")
    try:
        record: Any = json.loads(data)
        sample = Sample(
            key=_text(record["key"]),
            dataset=_text(record["dataset"]),
            turns=tuple(
                Turn(_text(turn["from"]), _text(turn["value"])) for turn in record["conversations"]
            ),
            media=tuple(
                MediumRef(_text(medium["modality"]), _text(medium["member"]))
                for medium in record["media"]
            ),
        )
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(
            f"{source}: not a sample record ({type(error).__name__}: {error}); it needs key, "
            "dataset, conversations (from, value) and media (modality, member)"
        ) from error
    validate_sample(sample, source=source)
    return sample


def validate_sample(
    sample: Sample, members: Collection[str] | None = None, source: str = ""
) -> None:
    """Refuse a sample whose text and media disagree.

    Args:
        sample: the sample.
        members: the members that exist for its key (``0.jpg`` ...); ``None`` skips this check.
        source: where it comes from, for messages.

    Raises:
        DataError: the message names the key and the first disagreement.
    """
    problem = (
        _name_problem(sample)
        or _turn_problem(sample.turns)
        or _media_problem(sample)
        or (_member_problem(sample, members) if members is not None else "")
    )
    if problem:
        raise DataError(f"{source + ': ' if source else ''}sample '{sample.key}': {problem}")


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected text, found {type(value).__name__}")
    return value


def _name_problem(sample: Sample) -> str:
    if not _KEY.fullmatch(sample.key):
        return "a key is 1-80 letters, digits, '_' or '-'"
    if not DATASET_NAME.fullmatch(sample.dataset):
        return f"dataset '{sample.dataset}' is not 1-40 letters, digits, '_' or '-'"
    return ""


def _turn_problem(turns: tuple[Turn, ...]) -> str:
    if len(turns) < 2 or len(turns) % 2:
        return f"{len(turns)} turns; a conversation has pairs of a human and a gpt turn"
    for index, turn in enumerate(turns):
        expected = (HUMAN, ASSISTANT)[index % 2]
        if turn.speaker != expected:
            return f"turn {index} is from '{turn.speaker}' but '{expected}' was expected"
        if turn.speaker == ASSISTANT:
            if not turn.text:
                return f"turn {index} is an empty answer"
            if found := _PLACEHOLDER.search(turn.text):
                return f"turn {index} has the placeholder {found.group()} in an answer"
    return ""


def _media_problem(sample: Sample) -> str:
    for medium in sample.media:
        if medium.modality not in MODALITIES:
            return f"unknown modality '{medium.modality}' (known: {', '.join(MODALITIES)})"
        if not MEMBER_NAME.fullmatch(medium.member):
            return f"'{medium.member}' is no member name such as 0.jpg"
    if len({medium.member for medium in sample.media}) != len(sample.media):
        return "two media name the same member"
    for modality, placeholder in PLACEHOLDERS.items():
        asked = sum(turn.text.count(placeholder) for turn in sample.turns)
        held = sum(medium.modality == modality for medium in sample.media)
        if asked != held:
            return f"{asked} {placeholder} placeholders but {held} {modality} media"
    return ""


def _member_problem(sample: Sample, members: Collection[str]) -> str:
    for medium in sample.media:
        if medium.member not in members:
            return f"its {medium.modality} medium {medium.member} is missing"
    return ""
