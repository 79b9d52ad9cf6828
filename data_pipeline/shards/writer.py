"""Writes shards with WebDataset's ``TarWriter``.

The bytes depend on the samples only: modification time, owner and order are fixed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING

from data_pipeline.errors import DataError
from data_pipeline.shards.index import ShardIndex
from data_pipeline.shards.scan import build_index, write_index
from data_pipeline.shards.schema import (
    MAX_MEDIUM_BYTES,
    Sample,
    modalities_of,
    validate_sample,
)

if TYPE_CHECKING:
    from webdataset import TarWriter


class ShardWriter:
    """Writes the samples of one dataset and combination into numbered shards.

    A shard appears, index first, by renames: a tar that is there is complete and has its index.
    Use it as a context manager; leaving it with an exception drops the unfinished shard.

    Args:
        folder: where ``<dataset>-00000.tar`` goes; made if it does not exist.
        dataset: name of the dataset.
        combination: combination that every sample must have.
        max_samples: most samples in a shard.
        max_bytes: a shard is closed when its media and records reach this size, bytes.
    """

    def __init__(
        self,
        folder: Path,
        dataset: str,
        combination: str,
        max_samples: int = 4000,
        max_bytes: int = 256 * 1024**2,
    ):
        modalities_of(combination)
        self.shards: list[ShardIndex] = []
        self._folder = Path(folder)
        self._dataset = dataset
        self._combination = combination
        self._max_samples = max_samples
        self._max_bytes = max_bytes
        self._keys: set[str] = set()
        self._tar: TarWriter | None = None
        self._stream: IO[bytes] | None = None
        self._samples = 0
        self._bytes = 0

    def write(self, sample: Sample, media: Mapping[str, bytes]) -> None:
        """Append a sample.

        Args:
            sample: the record.
            media: member name (``0.jpg``) -> bytes, for exactly the sample's media.

        Raises:
            DataError: the sample is not valid, of another dataset or combination, was written
                before, or has too large media.
        """
        validate_sample(sample, members=media)
        self._refuse_stranger(sample, media)
        record = sample.to_json()
        size = len(record) + sum(len(data) for data in media.values())
        full = self._samples >= self._max_samples or self._bytes + size > self._max_bytes
        if self._tar is not None and full:
            self._finish()
        if self._tar is None:
            self._begin()
        assert self._tar is not None
        self._tar.write({"__key__": sample.key, "json": record, **media})
        self._keys.add(sample.key)
        self._samples += 1
        self._bytes += size

    def close(self) -> list[ShardIndex]:
        """Finish the last shard; returns the indexes of all shards written."""
        if self._tar is not None:
            self._finish()
        return self.shards

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        elif self._stream is not None:
            self._stream.close()
            self._partial.unlink(missing_ok=True)

    @property
    def _path(self) -> Path:
        return self._folder / f"{self._dataset}-{len(self.shards):05d}.tar"

    @property
    def _partial(self) -> Path:
        return self._path.with_suffix(f".tar.partial-{os.getpid()}")

    def _refuse_stranger(self, sample: Sample, media: Mapping[str, bytes]) -> None:
        if sample.dataset != self._dataset:
            raise DataError(
                f"sample '{sample.key}' is of dataset {sample.dataset}, this shard's is "
                f"{self._dataset}"
            )
        if sample.combination != self._combination:
            raise DataError(
                f"sample '{sample.key}' is {sample.combination}, this shard holds "
                f"{self._combination} only; give each combination a dataset of its own"
            )
        if sample.key in self._keys:
            raise DataError(f"sample '{sample.key}' is written twice")
        if surplus := set(media) - {medium.member for medium in sample.media}:
            raise DataError(f"sample '{sample.key}' has unlisted media {sorted(surplus)}")
        for member, data in media.items():
            if len(data) > MAX_MEDIUM_BYTES:
                raise DataError(f"sample '{sample.key}': {member} exceeds {MAX_MEDIUM_BYTES} bytes")

    def _begin(self) -> None:
        from webdataset import TarWriter  # imports torch, which nobody who only reads needs

        self._folder.mkdir(parents=True, exist_ok=True)
        self._stream = self._partial.open("wb")
        self._tar = TarWriter(self._stream, encoder=False, mtime=0)
        self._samples = self._bytes = 0

    def _finish(self) -> None:
        assert self._tar is not None
        assert self._stream is not None
        self._tar.close()
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()
        self._tar = self._stream = None
        partial, path = self._partial, self._path
        table = build_index(partial)
        write_index(path, table)
        partial.replace(path)
        self.shards.append(ShardIndex(path, table.dataset, table.combination))
