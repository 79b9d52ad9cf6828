"""What cannot be asked is refused in one sentence, soon, and in little memory."""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import World
from tests.generation.bad_inputs import FILES, command_lines
from unimoe_mcore import generate
from unimoe_mcore.compose import speak
from unimoe_mcore.generation.prompt import place_markers


class Typed:
    """Types a command and looks at what comes of it."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path
    ) -> None:
        self._patch, self._said, self.folder = monkeypatch, capsys, folder

    def refused(self, *arguments: str) -> str:
        """The one sentence of the refusal."""
        self._patch.setattr(sys, "argv", ["generate", *arguments])
        began = time.monotonic()
        code = speak(generate.main)
        said = self._said.readouterr()
        assert code == 2
        assert time.monotonic() - began < 30
        assert said.out == ""
        assert said.err.startswith("error: ")
        assert said.err.count("\n") == 1
        assert said.err.endswith(".\n")
        return said.err


@pytest.fixture
def typed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Typed:
    return Typed(monkeypatch, capsys, tmp_path)


@pytest.mark.parametrize("name", FILES)
def test_files_that_cannot_be_used(name: str, typed: Typed, world: World) -> None:
    modality, make, words = FILES[name]
    path = typed.folder / "file.png"
    path.write_bytes(make())
    said = typed.refused(str(world.folder / "runs/stage3"), f"--{modality}", str(path), "What?")
    assert words in said
    assert str(path) in said


def test_command_lines_that_cannot_be(typed: Typed, world: World) -> None:
    for name, (arguments, words) in command_lines(typed.folder).items():
        said = typed.refused(str(world.folder / "runs/stage3"), *arguments)
        assert words in said, name


def test_runs_that_cannot_be_asked(typed: Typed, world: World) -> None:
    runs, folder = world.folder / "runs", typed.folder
    assert "There is no run at" in typed.refused(str(runs / "nothing"), "?")
    assert "it has no config.yaml" in typed.refused(str(world.folder / "data"), "?")
    config = runs / "stage3/config.yaml"
    assert "There is no run at" in typed.refused(str(config), "?")
    (folder / "young").mkdir()
    shutil.copy(config, folder / "young")
    assert "has no checkpoint" in typed.refused(str(folder / "young"), "?")
    (folder / "young/config.yaml").write_text("a: [")
    assert "cannot be read" in typed.refused(str(folder / "young"), "?")
    said = typed.refused(str(runs / "base"), "?", "--image", str(_file(folder)))
    assert "takes text only: it has no tower for image" in said
    said = typed.refused(str(runs / "base"), "?", "--processes", "2")
    assert "has no experts to divide" in said


def test_a_run_of_which_something_is_gone(typed: Typed, world: World) -> None:
    lonely = typed.folder / "lonely"
    shutil.copytree(world.folder / "runs/stage3", lonely)
    (lonely / "checkpoints/best.json").unlink()
    assert "has no best checkpoint" in typed.refused(str(lonely), "?", "--checkpoint", "best")
    config = lonely / "config.yaml"
    config.write_text(config.read_text().replace("/runs/base/gives", "/runs/gone/gives"))
    assert "runs/gone/gives" in typed.refused(str(lonely), "?")


@pytest.mark.parametrize(
    ("question", "media", "placed"),
    [
        ("What?", [], "What?"),
        ("What?", ["image"], "<image>\nWhat?"),
        ("What?", ["audio", "image", "audio"], "<audio>\n<image>\n<audio>\nWhat?"),
        ("Is <image> in <video>?", ["video", "image"], "Is <image> in <video>?"),
    ],
)
def test_where_media_go(question: str, media: list[str], placed: str) -> None:
    assert place_markers(question, media) == placed


def _file(folder: Path) -> Path:
    path = folder / "p.png"
    path.write_bytes(b"x")
    return path
