"""The records of a JSON list that is larger than memory should be, one after the other."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import ijson

from data_pipeline.errors import DataError

MOST_BYTES = 16 * 1024**2
"""Largest record, bytes of JSON; a little more may be read before it is refused."""
MOST_DEPTH = 16
"""Deepest nesting in a record."""

_OPENS, _CLOSES = ("start_map", "start_array"), ("end_map", "end_array")


def read_list(path: Path) -> Iterator[Any]:
    """The records of a file that holds one JSON list, as Python values.

    Memory is bounded by the largest record. A file that is cut off gives what is whole first.

    Raises:
        DataError: the file cannot be read, is no JSON list, or a record is too large or too deep;
            the message names the record by its number, from 0.
    """
    number = 0
    try:
        with path.open("rb") as file:
            source = _Bounded(file)
            builder, depth = ijson.ObjectBuilder(), 0
            for event, value in ijson.basic_parse(source, use_float=True):
                if not depth:
                    if event != "start_array":
                        raise DataError(f"{path} is no JSON list of records")
                    depth = 1
                    continue
                depth += (event in _OPENS) - (event in _CLOSES)
                if not depth:
                    continue  # what comes behind the list is an error that the parser raises
                if depth > MOST_DEPTH:
                    raise DataError(f"{path} record {number} is nested more than {MOST_DEPTH} deep")
                builder.event(event, value)
                if depth == 1:
                    yield builder.value
                    number += 1
                    source.taken = 0
                    builder = ijson.ObjectBuilder()
    except _TooLargeError as error:
        raise DataError(f"{path} record {number} has more than {MOST_BYTES} bytes") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror})") from error
    except (ijson.JSONError, ValueError) as error:
        said = error.args[0] if error.args else ""
        said = said.decode("utf-8", "replace") if isinstance(said, bytes) else str(said)
        reason = " ".join(said.partition("\n")[0].split())[:200]
        raise DataError(f"{path} is no JSON behind record {number} ({reason})") from error


class _TooLargeError(Exception):
    pass


class _Bounded:
    """A file that refuses to be read on and on for one record.

    Attributes:
        taken: bytes read since it was last set to 0.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.taken = 0

    def read(self, size: int) -> bytes:
        if self.taken > MOST_BYTES:
            raise _TooLargeError
        data = self._file.read(size)
        self.taken += len(data)
        return data
