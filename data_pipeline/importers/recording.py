"""Recordings as short mono 16-bit WAV files."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import soundfile
from numpy.typing import NDArray

from data_pipeline.errors import DataError
from data_pipeline.importers.item import MediaFile

MAX_SECONDS = 4
"""Longer recordings are cut off here, seconds."""


def read_mono(path: Path) -> tuple[NDArray[np.int16], int]:
    """The first ``MAX_SECONDS`` of a recording at its own rate, channels averaged.

    Returns:
        16-bit samples [frames] and the rate in Hz.

    Raises:
        DataError: the file cannot be decoded or is empty.
    """
    try:
        with soundfile.SoundFile(path) as file:
            rate = file.samplerate
            sound = file.read(MAX_SECONDS * rate, dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, RuntimeError, OSError) as error:
        raise DataError(f"{path} cannot be decoded: {error}") from error
    if not len(sound):
        raise DataError(f"{path} is empty")
    mono = sound.mean(axis=1)
    return np.clip(np.rint(mono * 32768), -32768, 32767).astype(np.int16), rate


def wav(modality: str, samples: NDArray[np.int16], rate: int) -> MediaFile:
    """16-bit samples [frames] at ``rate`` Hz as a WAV file of the given modality."""
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format="WAV", subtype="PCM_16")
    return MediaFile(modality, "wav", buffer.getvalue())
