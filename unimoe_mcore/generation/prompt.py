"""A question with its media: checked, read, decoded as in training, laid out as tokens.

Imports neither torch nor Megatron, so that what is wrong is refused at once.
"""

from __future__ import annotations

import os
import re
import stat
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data_pipeline.conversation.template import Rendered, render
from data_pipeline.conversation.tokenizer import MARKERS
from data_pipeline.modalities import MODALITIES, tower_modalities
from data_pipeline.planning.tower_rule import TowerRule
from data_pipeline.reading.apart import Decoded, decode_apart
from data_pipeline.reading.limits import BrokenMediumError, DecodeLimits
from data_pipeline.reading.medium import Medium
from data_pipeline.reading.sample import Sample
from unimoe_mcore.config.errors import UserError
from unimoe_mcore.config.recipe import Recipe
from unimoe_mcore.config.towers import EncoderConfig
from unimoe_mcore.generation.asked_run import AskedRun

MOST_MEDIA = 16
MOST_CHARACTERS = 20_000
LONGEST_MS = 3_600_000
"""Of a recording, milliseconds; much less of it is heard, and nobody should think otherwise."""
LIMITS = DecodeLimits(max_bytes=2**28)
SECONDS = 60.0
"""Longest that decoding one file may take."""

_MARKER = re.compile("|".join(MARKERS))


@dataclass(frozen=True)
class Attachment:
    """A file that a question is about.

    Attributes:
        modality: one of ``MODALITIES``.
        name: what messages call it.
        data: its bytes.
    """

    modality: str
    name: str
    data: bytes = field(repr=False)


@dataclass(frozen=True)
class Prompt:
    """A question that a run can be asked.

    Attributes:
        text: the question with a marker where each medium goes.
        sample: its tokens, ``<bos> question <ans>``, and its media, decoded.
        most: tokens that the answer may have.
        notes: what somebody who asks should know, a sentence each.
    """

    text: str
    sample: Sample
    most: int
    notes: tuple[str, ...] = ()


def read_attachment(modality: str, path: Path) -> Attachment:
    """The bytes of a file.

    Raises:
        UserError: it is missing, no ordinary file, empty, or larger than allowed.
        OSError: it cannot be read.
    """
    if not path.exists():
        raise UserError(f"There is no file {path}.")
    if path.is_dir():
        raise UserError(f"{path} is a folder: name a file.")
    # Not blocking: opening a pipe would wait for somebody to write into it.
    with open(path, "rb", opener=_without_waiting) as file:
        facts = os.fstat(file.fileno())
        if not stat.S_ISREG(facts.st_mode):
            raise UserError(f"{path} is no ordinary file: name a file.")
        if facts.st_size > LIMITS.max_bytes:
            raise UserError(f"{path} has {facts.st_size >> 20} MiB, at most 256 are taken.")
        return Attachment(modality, str(path), file.read(LIMITS.max_bytes + 1))


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


def make_prompt(
    run: AskedRun, question: str, attachments: Sequence[Attachment], most: int
) -> Prompt:
    """Check and decode a question's media and lay it out as the run was trained.

    Args:
        run: that is asked.
        question: may have a marker such as ``<image>`` where each medium goes; without any, all
            media come before it, in their order.
        attachments: the k-th ``<image>`` stands for the k-th image, and so on.
        most: tokens that the answer may have.

    Raises:
        UserError: the question, a file, or their number cannot be.
    """
    text = place_markers(question, [each.modality for each in attachments])
    _refuse_foreign(run.recipe, attachments)
    rule = TowerRule(run.recipe.model.towers)
    encoders = [rule.tower(each.modality).encoder for each in attachments]
    media: dict[str, list[Medium]] = {modality: [] for modality in MODALITIES}
    tokens: dict[str, list[int]] = {modality: [] for modality in MODALITIES}
    notes: list[str] = []
    for each, encoder, decoded in zip(
        attachments, encoders, _decoded(attachments, encoders), strict=True
    ):
        medium = Medium(each.modality, each.data, each.name, decoded.content)
        media[each.modality].append(medium)
        tokens[each.modality].append(rule.tokens(each.modality, decoded.duration_ms))
        if decoded.duration_ms > 1000 * encoder.max_seconds:
            notes.append(
                f"{each.name} lasts {decoded.duration_ms / 1000:.0f} s, of which the model hears "
                f"the first {encoder.max_seconds:g} s."
            )
    rendered = render([{"from": "human", "value": text}], run.tokenizer, tokens)
    _refuse_long(rendered, most, run.recipe.model.language.max_tokens)
    group = next((m for m in MODALITIES if media[m]), "text")
    return Prompt(
        text,
        Sample("question", "prompt", group, rendered, _in_order(text, media)),
        most,
        tuple(notes),
    )


def place_markers(question: str, modalities: Sequence[str]) -> str:
    """The question with one marker for every medium, where it says or else before it.

    Raises:
        UserError: it is empty, too long, no text, or its markers are other than the media.
    """
    if len(question) > MOST_CHARACTERS:
        raise UserError(
            f"The question has {len(question)} characters, at most {MOST_CHARACTERS} are taken."
        )
    if len(modalities) > MOST_MEDIA:
        raise UserError(f"{len(modalities)} files are given, at most {MOST_MEDIA} are taken.")
    try:
        question.encode()
    except UnicodeEncodeError as error:
        raise UserError("The question is not UTF-8 text.") from error
    if not _MARKER.sub("", question).strip():
        raise UserError("The question is empty: say what you want to know.")
    placed = _MARKER.findall(question)
    if not placed:
        return "".join(f"<{modality}>\n" for modality in modalities) + question
    wanted, given = Counter(placed), Counter(f"<{modality}>" for modality in modalities)
    for marker in wanted - given:
        raise UserError(
            f"The question has {marker} {_times(wanted[marker])}, but a file is given for it "
            f"{_times(given[marker])}: add the file, or take the placeholder out."
        )
    for marker in given - wanted:
        raise UserError(
            f"A file is given as {marker[1:-1]} {_times(given[marker])}, but the question has "
            f"{marker} {_times(wanted[marker])}: say where each goes, or use no placeholders."
        )
    return question


def _times(number: int) -> str:
    return {0: "never", 1: "once", 2: "twice"}.get(number, f"{number} times")


def _refuse_foreign(recipe: Recipe, attachments: Iterable[Attachment]) -> None:
    """Refuse media that the run has no tower for."""
    towers = () if recipe.stage.kind == "base" else recipe.model.towers
    known = [modality for tower in towers for modality in tower_modalities(tower)]
    for each in attachments:
        if each.modality not in known:
            takes = f"{', '.join(known)} and text" if known else "text only"
            raise UserError(
                f"{recipe.name} takes {takes}: it has no tower for {each.modality} ({each.name})."
            )


def _decoded(attachments: Sequence[Attachment], encoders: Sequence[EncoderConfig]) -> list[Decoded]:
    media = [Medium(each.modality, each.data, each.name) for each in attachments]
    try:
        found = decode_apart(list(zip(media, encoders, strict=True)), LIMITS, SECONDS)
    except BrokenMediumError as error:
        raise UserError(f"{error.source} cannot be used: {error.reason}.") from None
    for each, decoded in zip(attachments, found, strict=True):
        if decoded.moves:
            raise UserError(
                f"{each.name} is an animation: save one frame as a picture, or the whole as MP4 "
                f"for video."
            )
        if decoded.duration_ms > LONGEST_MS:
            raise UserError(
                f"{each.name} lasts {decoded.duration_ms / 60_000:.0f} minutes, at most "
                f"{LONGEST_MS // 60_000} are taken: cut out what the question is about."
            )
    return found


def _refuse_long(rendered: Rendered, most: int, room: int) -> None:
    asked = len(rendered.ids)
    if asked + most > room:
        raise UserError(
            f"The question takes {asked} tokens with its media and the answer may take {most}, but "
            f"the model has room for {room}: shorten the question, or allow fewer."
        )


def _in_order(text: str, media: dict[str, list[Medium]]) -> tuple[Medium, ...]:
    """All media in the order of their markers."""
    left = {modality: iter(each) for modality, each in media.items()}
    return tuple(next(left[marker[1:-1]]) for marker in _MARKER.findall(text))
