"""Features of frozen encoders on disk: every medium is encoded once, by whoever needs it first."""

from __future__ import annotations

import contextlib
import io
import json
import os
import secrets
import zlib
from collections.abc import Callable
from itertools import batched
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data_pipeline.reading.features import feature_path
from data_pipeline.reading.medium import Medium
from unimoe_mcore.config.errors import UserError
from unimoe_mcore.model.towers.encoders import Encoder, build_encoder

_CHUNK = 64  # media encoded before their features are written: what a kill can cost
_CHECKSUM = 4  # bytes


class FeatureCache:
    """Features by encoder fingerprint and media digest.

    Layout: ``root/<name>-<fingerprint[:16]>/<dd>/<digest>.npy``, a float16 array followed by its
    CRC-32; ``<digest>.video.npy`` for videos, since one file may serve as picture and as video.
    Files appear by an atomic rename, so any number of processes may share a folder: two that
    miss the same medium both encode it, and the same bytes win. A damaged file is a miss.

    Attributes:
        encoder: the encoder behind the cache.
        folder: this encoder's folder.
        given: whether the encoder's weights are another run's, not the published ones.
        stores: whether what is encoded is written to disk.
        operations: of the encoder for what it has encoded so far; what lay on disk cost none.
    """

    def __init__(
        self, root: Path, encoder: Encoder, again: Callable[[], Encoder] | None = None
    ) -> None:
        """Describe the encoder's folder.

        Args:
            again: builds an encoder with the same weights; None where the configuration says all.
        """
        self.encoder = encoder
        self.given = again is not None
        self._again = again or (lambda: build_encoder(encoder.config))
        self.operations = 0
        self.stores = True
        self._released = False
        fingerprint = encoder.fingerprint()
        self.folder = root / f"{encoder.name}-{fingerprint[:16]}"
        self._describe(fingerprint)

    def release(self) -> None:
        """Give the encoder's weights back: this rank needs them for nothing foreseeable.

        What is asked of it still works; the weights are then loaded again.
        """
        self.encoder.to("meta")
        self._released = True

    def ready(self) -> Encoder:
        """The encoder with its weights."""
        if self._released:
            self.encoder = self._again()
            self._released = False
        return self.encoder

    def features(self, media: list[Medium]) -> list[Tensor]:
        """Features of every medium, from disk where they are, else encoded and stored.

        Media that occur twice are encoded once and share their tensor.

        Returns:
            What ``Encoder.encode`` returns: one float16 CPU tensor for each medium.

        Raises:
            BrokenMediumError: a medium that is not cached cannot be decoded.
            UserError: the folder cannot be written.
        """
        found: dict[Path, Tensor] = {}
        misses: dict[Path, Medium] = {}
        for medium in media:
            path = self._path(medium)
            if path in found or path in misses:
                continue
            stored = self._read(path, medium)
            if stored is None:
                misses[path] = medium
            else:
                found[path] = stored
        for chunk in batched(misses.items(), _CHUNK):
            encoded = self.ready().encode([medium for _, medium in chunk])
            for (path, _), features in zip(chunk, encoded, strict=True):
                self.operations += self.encoder.operations(features)
                if self.stores:
                    self._write(path, _pack(features.numpy()))
                found[path] = features
        return [found[self._path(medium)] for medium in media]

    def missing(self, media: list[Medium]) -> list[Medium]:
        """Those media, each once, of which there is no file; damage is not looked for."""
        absent = {self._path(m): m for m in media if not self._path(m).exists()}
        return list(absent.values())

    def _path(self, medium: Medium) -> Path:
        return feature_path(self.folder, medium)

    def _read(self, path: Path, medium: Medium) -> Tensor | None:
        """The stored features, or None where there are none that can be trusted."""
        try:
            array = _unpack(bytearray(path.read_bytes()))
        except (OSError, ValueError):
            return None
        rank = 3 if medium.modality == "video" else 2
        if array.dtype != np.float16 or array.ndim != rank:
            return None
        return torch.from_numpy(array) if array.shape[-1] == self.encoder.feature_size else None

    def _write(self, path: Path, content: bytes) -> None:
        draft = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            draft.write_bytes(content)
            draft.replace(path)
        except OSError as error:
            with contextlib.suppress(OSError):
                draft.unlink()
            raise UserError(
                f"The feature cache cannot write {path} ({error.strerror}); "
                f"free some space or choose another cache folder."
            ) from error

    def _describe(self, fingerprint: str) -> None:
        """Say in the folder what its features were made with; refuse a folder that says else."""
        path = self.folder / "description.json"
        description = {
            "encoder": self.encoder.name,
            "fingerprint": fingerprint,
            "version": self.encoder.version,
            "feature_size": self.encoder.feature_size,
            "settings": self.encoder.settings(),
        }
        if path.exists():
            try:
                held = json.loads(path.read_text(encoding="utf-8")).get("fingerprint")
            except (ValueError, AttributeError):
                held = None
            if held == fingerprint:
                return
            if held is not None:
                raise UserError(f"{path} describes another encoder; remove {self.folder}.")
        self._write(path, (json.dumps(description, indent=2) + "\n").encode())


def _pack(array: np.ndarray) -> bytes:
    """An ``.npy`` file and, behind it, the CRC-32 of all its bytes."""
    file = io.BytesIO()
    np.save(file, np.ascontiguousarray(array), allow_pickle=False)
    content = file.getvalue()
    return content + zlib.crc32(content).to_bytes(_CHECKSUM, "little")


def _unpack(content: bytearray) -> np.ndarray:
    """The array of ``_pack``'s bytes, without a copy.

    Raises:
        ValueError: the bytes are not what was written.
    """
    body = memoryview(content)[:-_CHECKSUM]
    if zlib.crc32(body) != int.from_bytes(content[-_CHECKSUM:], "little"):
        raise ValueError("the checksum does not fit")
    file = io.BytesIO(body)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("another version of the format")
    shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
    if fortran_order:
        raise ValueError("columns first")
    return np.frombuffer(body, dtype, offset=file.tell()).reshape(shape)
