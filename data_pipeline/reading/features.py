"""Where the features of a frozen encoder lie on disk, and what can be seen without reading them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data_pipeline.modalities import modality
from data_pipeline.reading.medium import Medium


def feature_path(folder: Path, medium: Medium) -> Path:
    """The file that holds, or would hold, a medium's features in the folder of their encoder.

    What another modality's tower takes has an ending of its own: one file may serve as picture and
    as video.
    """
    ending = f".{medium.modality}.npy" if modality(medium.modality).tower else ".npy"
    return folder / medium.digest[:2] / (medium.digest + ending)


def stored_features(path: Path) -> int | None:
    """Length of the first dimension of stored features; None where there are none to be seen."""
    try:
        with path.open("rb") as file:
            if np.lib.format.read_magic(file) != (1, 0):
                return None
            shape = np.lib.format.read_array_header_1_0(file)[0]
    except (OSError, ValueError):
        return None
    return int(shape[0]) if shape else None
