"""Where media of records from elsewhere lie: only in the folders and zip files that are given.

Records name media by paths of the machine that they were written on. Beginnings of paths are
exchanged as told; what then lies outside the given folders, also by ``..`` or a link, is refused.
"""

from __future__ import annotations

import os
import stat
import zipfile
import zlib
from collections.abc import Sequence
from lzma import LZMAError
from pathlib import Path

from data_pipeline.errors import DataError
from data_pipeline.shards.schema import MAX_MEDIUM_BYTES


class MissingMediumError(DataError):
    """A medium is in none of the given places."""


class MediaPlaces:
    """Reads media by the names that records have for them.

    Args:
        folders: media lie in these; names that are no absolute paths are looked up in this order.
        exchanged: beginnings of names and what stands for them; the first that fits is exchanged.
        archives: zip files that hold media by names that are no absolute paths.

    Raises:
        DataError: a folder or zip file is not there, or is none.
    """

    def __init__(
        self,
        folders: Sequence[Path],
        exchanged: Sequence[tuple[str, str]] = (),
        archives: Sequence[Path] = (),
    ) -> None:
        for folder in folders:
            if not folder.is_dir():
                raise DataError(f"{folder} is no folder of media")
        self._folders = [folder.resolve() for folder in folders]
        self._exchanged = list(exchanged)
        self._archives = [_opened(path) for path in archives]

    def read(self, name: str) -> bytes:
        """The bytes of a medium.

        Raises:
            MissingMediumError: it is not there.
            DataError: it lies outside the given folders, is no ordinary file, too large, or cannot
                be read.
        """
        for old, new in self._exchanged:
            if name.startswith(old):
                name = new + name[len(old) :]
                break
        if not name or "\0" in name:
            raise DataError("is no name of a file")
        absolute = os.path.isabs(name)
        for archive in () if absolute else self._archives:
            if name in archive.NameToInfo:
                return _unpacked(archive, name)
        for place in [Path(name)] if absolute else [folder / name for folder in self._folders]:
            if (found := self._inside(place)) is not None:
                return _bytes_of(found)
        raise MissingMediumError(f"{name} does not exist")

    def _inside(self, path: Path) -> Path | None:
        """Where a path leads, links followed; None: to nothing."""
        try:
            real = path.resolve()
            there = real.exists()
        except (OSError, RuntimeError) as error:  # a name that is too long, a link to itself
            raise DataError(f"{path} cannot be read ({error})") from error
        if not any(real.is_relative_to(folder) for folder in self._folders):
            raise DataError(f"{path} lies outside the folders of media")
        return real if there else None


def _bytes_of(path: Path) -> bytes:
    try:
        # Not blocking: opening a pipe would wait for somebody to write into it.
        with open(path, "rb", opener=lambda p, flags: os.open(p, flags | os.O_NONBLOCK)) as file:
            facts = os.fstat(file.fileno())
            if not stat.S_ISREG(facts.st_mode):
                raise DataError(f"{path} is no ordinary file")
            # One more than there are: ``read`` makes room for all that it is asked for.
            data = file.read(min(facts.st_size, MAX_MEDIUM_BYTES) + 1)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror})") from error
    if len(data) > MAX_MEDIUM_BYTES:
        raise DataError(f"{path} has more than {MAX_MEDIUM_BYTES} bytes")
    return data


def _opened(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} is no zip file that can be read ({error})") from error


def _unpacked(archive: zipfile.ZipFile, name: str) -> bytes:
    """A member's bytes; its header may lie about how many there are."""
    try:
        with archive.open(name) as member:
            data = member.read(MAX_MEDIUM_BYTES + 1)
    except (
        zipfile.BadZipFile,
        zlib.error,
        LZMAError,
        OSError,
        EOFError,
        RuntimeError,  # encrypted; NotImplementedError, of another compression, is among these
        ValueError,
    ) as error:
        raise DataError(f"{name} in {archive.filename} cannot be read ({error})") from error
    if len(data) > MAX_MEDIUM_BYTES:
        raise DataError(f"{name} in {archive.filename} has more than {MAX_MEDIUM_BYTES} bytes")
    return data
