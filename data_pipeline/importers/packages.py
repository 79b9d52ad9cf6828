"""Debian packages as plain folders: fetched and unpacked as an ordinary user, never installed.

``apt-get download`` checks every archive against the signed package lists; ``dpkg-deb`` only
decompresses it. No maintainer script is run and nothing outside the cache folder is written.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import IO

from data_pipeline.errors import DataError

MAX_UNPACKED_BYTES = 2 * 1024**3
"""Largest package that is unpacked, bytes."""
ABANDONED_SECONDS = 24 * 3600
"""Age after which a half-unpacked package cannot belong to a process that still works on it."""

APT_OPTIONS = (
    "APT::Sandbox::User=",
    "Debug::NoLocking=1",
    "Acquire::Retries=1",
    "Acquire::http::Timeout=20",
    "Acquire::https::Timeout=20",
)


class PackageError(DataError):
    """A Debian package can be neither found in the cache nor fetched.

    Attributes:
        package: the package's name.
        reason: why, in a few words.
    """

    def __init__(self, package: str, reason: str):
        self.package = package
        self.reason = reason
        super().__init__(
            f"Debian package {package} cannot be fetched: {reason}; fetch it on a machine with "
            "apt and copy the cache folder, or go on without it"
        )


def unpack_tar(stream: IO[bytes], folder: Path, limit: int = MAX_UNPACKED_BYTES) -> None:
    """Unpack a tar stream below ``folder`` and nowhere else.

    Links that point out of the folder are left out (packages link into the system they expect to
    be installed in). File modes lose setuid and group/other write bits.

    Raises:
        DataError: a member would be written outside the folder, is a device, or the files
            together exceed ``limit`` bytes.
    """
    total = 0
    try:
        with tarfile.open(fileobj=stream, mode="r|") as tar:
            for member in tar:
                total += member.size
                if total > limit:
                    raise DataError(f"archive for {folder} is larger than {limit} bytes")
                try:
                    tar.extract(member, folder, filter="data")
                except (tarfile.AbsoluteLinkError, tarfile.LinkOutsideDestinationError):
                    continue
    except tarfile.TarError as error:
        raise DataError(f"archive for {folder} is refused: {error}") from error


class PackageStore:
    """A cache folder of unpacked Debian packages, one folder per name and version.

    A package appears under its final name by one rename, so a folder that exists is complete,
    whatever was killed while it was being made. Several processes may share the cache.

    Args:
        folder: the cache folder; made when the first package is fetched.
        say: told when a package is being fetched, which may take minutes.

    Attributes:
        folder: the cache folder.
        versions: name -> version of every package handed out so far.
    """

    def __init__(self, folder: Path, say: Callable[[str], None] | None = None):
        self.folder = Path(folder).absolute()
        self._say = say or (lambda message: None)
        self.versions: dict[str, str] = {}
        self._unreachable = ""
        self._private_lists = False

    def get(self, name: str) -> Path:
        """The folder that holds the package's files (``<folder>/usr/share/...``).

        Raises:
            PackageError: it is neither cached nor can be fetched.
        """
        if not re.fullmatch(r"[a-z0-9][a-z0-9+.-]+", name):
            raise PackageError(name, "this is no package name")
        cached = sorted(self.folder.glob(f"{name}_*"))
        root = cached[-1] if cached else self._fetch(name)
        self.versions[name] = root.name.split("_", 1)[1]
        return root

    def programs(self, name: str) -> tuple[Path, ...]:
        """Folders of a program's package and of every dependency that this machine lacks.

        The list is apt's own answer to what an installation would add; it is remembered in the
        cache, so a second call needs no apt.

        Raises:
            PackageError: one of them is neither cached nor can be fetched.
        """
        note = self.folder / f".needs-{name}.json"
        if note.is_file():
            needs = [str(item) for item in json.loads(note.read_text("utf-8"))]
        else:
            self.get(name)  # first, because this repairs missing or stale package lists
            needs = self._missing_dependencies(name)
        roots = tuple(self.get(each) for each in dict.fromkeys([name, *needs]))
        if not note.is_file():
            _write_atomically(note, json.dumps(needs))
        return roots

    def _missing_dependencies(self, name: str) -> list[str]:
        answer = self._apt(
            ["--simulate", "--no-install-recommends", "install", name], cwd=self.folder
        )
        if answer.returncode:
            raise PackageError(name, _reason(answer))
        return re.findall(r"^Inst (\S+) ", answer.stdout, flags=re.MULTILINE)

    def _fetch(self, name: str) -> Path:
        if self._unreachable:
            raise PackageError(name, self._unreachable)
        for tool in ("apt-get", "dpkg-deb"):
            if shutil.which(tool) is None:
                self._unreachable = f"this machine has no {tool}"
                raise PackageError(name, self._unreachable)
        self._say(f"fetching Debian package {name}")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._drop_abandoned()
            with tempfile.TemporaryDirectory(prefix=".partial-", dir=self.folder) as scratch:
                return self._unpack(name, self._download(name, Path(scratch)), Path(scratch))
        except OSError as error:
            raise PackageError(name, str(error)) from error

    def _drop_abandoned(self) -> None:
        """Remove what a killed process left half unpacked."""
        for scratch in self.folder.glob(".partial-*"):
            if time.time() - scratch.stat().st_mtime > ABANDONED_SECONDS:
                shutil.rmtree(scratch, ignore_errors=True)

    def _download(self, name: str, scratch: Path) -> Path:
        answer = self._apt(["download", name], cwd=scratch)
        if answer.returncode and not self._private_lists:
            self._refresh_lists()
            answer = self._apt(["download", name], cwd=scratch)
        archives = list(scratch.glob("*.deb"))
        if answer.returncode or len(archives) != 1:
            reason = _reason(answer)
            if self._private_lists and not any((self._apt_state / "lists").glob("*Packages*")):
                self._unreachable = reason  # no mirror answered: do not wait for it again
            raise PackageError(name, reason)
        return archives[0]

    def _unpack(self, name: str, archive: Path, scratch: Path) -> Path:
        version = archive.stem.split("_")[1]
        target = self.folder / f"{name}_{version}"
        partial = scratch / "root"
        partial.mkdir()
        command = ["dpkg-deb", "--fsys-tarfile", str(archive)]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        ) as process:
            assert process.stdout is not None
            try:
                unpack_tar(process.stdout, partial)
            except DataError as error:
                process.kill()
                raise PackageError(name, str(error)) from error
            # tarfile stops at the end mark; the padding after it must be drained.
            while process.stdout.read(1 << 20):
                pass
        if process.returncode:
            raise PackageError(name, "its archive is damaged")
        try:
            partial.rename(target)
        except OSError:
            if not target.is_dir():  # otherwise another process was faster
                raise
        return target

    @property
    def _apt_state(self) -> Path:
        return self.folder / ".apt"

    def _refresh_lists(self) -> None:
        """Fetch package lists into the cache: the system's are missing or out of date."""
        for part in ("lists/partial", "cache/archives/partial"):
            (self._apt_state / part).mkdir(parents=True, exist_ok=True)
        self._private_lists = True
        self._apt(["update"], cwd=self.folder)

    def _apt(self, arguments: Sequence[str], cwd: Path) -> subprocess.CompletedProcess[str]:
        options = list(APT_OPTIONS)
        if self._private_lists:
            options += [
                f"Dir::State::Lists={self._apt_state / 'lists'}",
                f"Dir::Cache={self._apt_state / 'cache'}",
            ]
        command = ["apt-get", "-q", *(part for option in options for part in ("-o", option))]
        return subprocess.run(
            [*command, *arguments],
            cwd=cwd,
            env={**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )


def library_path(roots: Iterable[Path]) -> str:
    """``LD_LIBRARY_PATH`` that lets a program of unpacked packages find their libraries."""
    folders: list[str] = []
    for root in roots:
        for base in (root / "usr" / "lib", root / "lib"):
            if base.is_dir():
                holders = {file.parent for file in base.rglob("*.so*")}
                folders += sorted(str(holder) for holder in holders)
    return ":".join(folders)


def _reason(answer: subprocess.CompletedProcess[str]) -> str:
    """apt's own last complaint on one line, without addresses."""
    lines = [line for line in answer.stderr.splitlines() if re.match(r"[EW]: ", line)]
    text = lines[-1][3:] if lines else "apt-get found no such package"
    return re.sub(r"\S+://\S+", "the mirror", text).strip().rstrip(".")


def _write_atomically(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
