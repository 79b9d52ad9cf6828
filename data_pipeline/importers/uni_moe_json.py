"""Records of Uni-MoE's released JSON, or of any list like it, become samples of ours.

A record has ``conversations`` (``from``, ``value``) and media: ``image`` is the path of a picture,
``voice`` of a recording, ``video`` a list of paths of frames. Several pictures or recordings are a
list of paths, several videos a list of such lists; a video that is one path is a clip. The k-th
``<image>``, ``<video>``, ``<audio>`` stands for the k-th of its kind. ``<audio>`` stands for speech
and for other sounds alike, since a model of the original has a tower for one of them only: which
one is said for the whole list.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from data_pipeline.errors import DataError
from data_pipeline.importers.frames import ENDING, clip_of
from data_pipeline.importers.media_places import MediaPlaces, MissingMediumError
from data_pipeline.modalities import modality
from data_pipeline.reading.decode import LIMITS, BrokenMediumError, probe_image
from data_pipeline.reading.medium import Medium
from data_pipeline.shards.schema import (
    MAX_MEDIUM_BYTES,
    MAX_RECORD_BYTES,
    PLACEHOLDERS,
    MediumRef,
    Sample,
    Turn,
    validate_sample,
)

MOST_MEDIA = 1000
MOST_BYTES = 2 * MAX_MEDIUM_BYTES
"""Bytes of all media of a record together; they are in memory at once."""
MOST_REASON = 500
"""Characters of a reason that are said."""
VOICES = ("speech", "audio")

RECORD, MARKERS, MISSING, REFUSED, BROKEN = "record", "markers", "missing", "refused", "broken"
"""What can be wrong with a record: its fields; its text has other markers than it has media; a
medium is not there, must not be read, or is no medium."""

_ENDING = re.compile(r"[a-z0-9]{1,8}")


class BadRecordError(DataError):
    """A record that cannot become a sample.

    Attributes:
        kind: ``record``, ``markers``, ``missing``, ``refused`` or ``broken``.
    """

    def __init__(self, kind: str, reason: str) -> None:
        short = reason if len(reason) <= MOST_REASON else reason[:MOST_REASON] + " ..."
        super().__init__(short)
        self.kind = kind


@dataclass(frozen=True)
class RecordReader:
    """Makes samples of records.

    Attributes:
        dataset: name of the dataset that they belong to.
        voice: modality that ``voice`` and ``<audio>`` stand for, ``speech`` or ``audio``.
        places: where media lie.
    """

    dataset: str
    voice: str
    places: MediaPlaces

    def sample(self, record: Any, number: int) -> tuple[Sample, dict[str, bytes]]:
        """A record's sample, and its media by member.

        Args:
            record: as it lies in the list.
            number: of the record in the list, from 0; becomes its key.

        Raises:
            BadRecordError: naming the field and what is wrong with it.
        """
        if not isinstance(record, dict):
            raise BadRecordError(RECORD, f"it is {_called(record)}, a record has fields")
        turns = self._turns(record.get("conversations"))
        media: list[tuple[str, str, bytes]] = []
        for field, kind in (("image", "image"), ("video", "video"), ("voice", self.voice)):
            found = _media_of(record, field)
            for place, names in enumerate(found):
                where = field if found == [record[field]] else f"{field}[{place}]"
                if len(media) == MOST_MEDIA:
                    raise BadRecordError(RECORD, f"{where}: more than {MOST_MEDIA} media")
                media.append((kind, *self._file(kind, names, where)))
                if sum(len(data) for _, _, data in media) > MOST_BYTES:
                    raise BadRecordError(REFUSED, f"{where}: more than {MOST_BYTES} bytes of media")
        members = {f"{n}.{ending}": data for n, (_, ending, data) in enumerate(media)}
        references = (
            MediumRef(kind, member) for (kind, _, _), member in zip(media, members, strict=True)
        )
        sample = Sample(f"{self.dataset}-{number:07d}", self.dataset, turns, tuple(references))
        _refuse_invalid(sample, members)
        return sample, members

    def _turns(self, conversations: Any) -> tuple[Turn, ...]:
        if not isinstance(conversations, list):
            raise BadRecordError(
                RECORD, f"conversations is {_called(conversations)}, a list of turns was expected"
            )
        turns = []
        for place, turn in enumerate(conversations):
            where = f"conversations[{place}]"
            if not isinstance(turn, dict):
                raise BadRecordError(RECORD, f"{where} is {_called(turn)}, a turn has fields")
            for field in ("from", "value"):
                if not isinstance(turn.get(field), str):
                    raise BadRecordError(
                        RECORD, f"{where}.{field} is {_called(turn.get(field))}, text was expected"
                    )
            text = turn["value"]
            if turn["from"] == "human" and self.voice != "audio":
                if PLACEHOLDERS[self.voice] in text:
                    raise BadRecordError(
                        MARKERS, f"{where} has {PLACEHOLDERS[self.voice]}; <audio> stands for it"
                    )
                text = text.replace("<audio>", PLACEHOLDERS[self.voice])
            turns.append(Turn(turn["from"], text))
        return tuple(turns)

    def _file(self, kind: str, names: str | list[str], where: str) -> tuple[str, bytes]:
        """Ending and bytes of one medium.

        Args:
            kind: its modality.
            names: its path, or those of the frames of a video.
        """
        if isinstance(names, str):
            medium = self._read(kind, names, where)
            ending = PurePosixPath(names).suffix[1:].lower()
            ending = ending if _ENDING.fullmatch(ending) and ending != "json" else "bin"
            return ending, _looked_at(medium, where)
        frames = [self._read("image", n, f"{where} frame {i}") for i, n in enumerate(names)]
        return ENDING, _tried(lambda: clip_of(frames), where)

    def _read(self, kind: str, name: str, where: str) -> Medium:
        try:
            return Medium(kind, self.places.read(name), name)
        except MissingMediumError as error:
            raise BadRecordError(MISSING, f"{where}: {error}") from error
        except DataError as error:
            raise BadRecordError(REFUSED, f"{where}: {error}") from error


def _media_of(record: Mapping[str, Any], field: str) -> list[str | list[str]]:
    """The media of a field: paths, and for videos lists of paths of frames."""
    value = record.get(field)
    if value is None or value in ("", []):
        return []
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and all(isinstance(each, str) for each in value):
        return [value] if field == "video" else list(value)
    lists = isinstance(value, list) and all(isinstance(each, list) and each for each in value)
    if field == "video" and lists and all(isinstance(n, str) for each in value for n in each):
        return list(value)
    raise BadRecordError(RECORD, f"{field} is {_called(value)}, a path or a list was expected")


def _called(value: Any) -> str:
    names = {dict: "an object", list: "a list of other things", str: "text", bool: "true or false"}
    return "missing" if value is None else names.get(type(value), "a number")


def _looked_at(medium: Medium, where: str) -> bytes:
    """The bytes of a medium whose header a decoder understands."""

    length = modality(medium.modality).length

    def look() -> bytes:
        if length is None:
            probe_image(medium)
        else:
            length(medium, LIMITS)
        return medium.data

    return _tried(look, where)


def _tried(what: Callable[[], bytes], where: str) -> bytes:
    try:
        return what()
    except BrokenMediumError as error:
        raise BadRecordError(BROKEN, f"{where}: {error.source}: {error.reason}") from error


def _refuse_invalid(sample: Sample, members: Mapping[str, bytes]) -> None:
    try:
        validate_sample(sample, members)
    except DataError as error:
        reason = str(error).partition(": ")[2]
        kind = MARKERS if "placeholder" in reason else RECORD
        raise BadRecordError(kind, f"conversations: {reason}") from error
    size = len(sample.to_json())
    if size > MAX_RECORD_BYTES:
        raise BadRecordError(
            RECORD, f"conversations: {size} bytes of text are more than {MAX_RECORD_BYTES}"
        )
