"""Mirrors of a run: a recorded run directory, real wandb offline, real event files."""

from __future__ import annotations

import importlib
import importlib.util
import json
import shutil
import struct
import sys
import threading
import time
from collections.abc import Iterator
from copy import deepcopy
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from unimoe_mcore.config.composition import compose_recipe
from unimoe_mcore.config.errors import UserError
from unimoe_mcore.config.recipe import Recipe
from unimoe_mcore.evaluation.routing_picture import draw_routing
from unimoe_mcore.runtime.mirror_packages import check_mirrors
from unimoe_mcore.runtime.run_directory import RunDirectory, read_lines
from unimoe_mcore.training import mirror_tensorboard, mirror_wandb, mirrors
from unimoe_mcore.training.mirror_rows import Row, expert_names
from unimoe_mcore.training.mirrors import Mirrors

EXPERTS = ["base", "image", "speech", "audio"]


@cache
def composed(*extra: str) -> Recipe:
    return compose_recipe("stage3", ["name=recorded", "trainer.steps=9", *extra])


def recipe(folder: Path, *extra: str) -> Recipe:
    chosen = deepcopy(composed(*extra))
    chosen.paths.runs = str(folder)
    return chosen


def train(
    run: RunDirectory,
    recipe: Recipe,
    first: int,
    last: int,
    close: bool = True,
    last_words: bool = True,
) -> Mirrors:
    """What a run does with its directory and its mirrors, without the training.

    Args:
        close: at the end; else the mirrors are as after a kill.
        last_words: whether they show what is left before that; else they go on.
    """
    run.forget_after(first)
    told = Mirrors(run, recipe)
    told.start(first)
    for step in range(first + 1, last + 1):
        run.metrics(metrics(step))
        if step % 3 == 0:
            run.validation(validation(step))
        told.step(SimpleNamespace(step=step))  # type: ignore[arg-type]
    told.end()
    if close:
        if last == recipe.trainer.steps:
            answer(run, "after", 0.75)
        told.close()
    elif last_words:
        for follower in told._followers:  # a kill, when all was shown
            follower._work.put(None)
            follower._thread.join(60)
    return told


def metrics(step: int) -> dict[str, Any]:
    line: dict[str, Any] = {"step": step, "grad_norm": 0.5, "lr": 1e-3, "mfu": 0.1 * step}
    line |= {"loss": 4 / step, "loss/image": 3 / step, "loss/speech": 5 / step}
    if step % 2 == 0:
        line["router/load"] = {"0": [0.1, 0.2, 0.3, 0.4], "2": [0.25, 0.25, 0.25, 0.25]}
        line["router/groups"] = {"0": {"image": [0.7, 0.1, 0.1, 0.1]}}
        line["router/dead"] = ["0:1"]
    return line


def validation(step: int) -> dict[str, Any]:
    shares = {"image": [0.1, 0.6, 0.2, 0.1], "speech": [0.1, 0.1, 0.7, 0.1]}
    return {
        "step": step, "split": "val", "asked": 8, "answered": 8, "seconds": 0.1,
        "loss": 5 / step, "loss/image": 6 / step, "exact/img": 0.5,
        "router/groups": {"0": shares, "2": shares},
    }  # fmt: skip


def answer(run: RunDirectory, name: str, share: float) -> None:
    records = [
        {"dataset": "img", "group": "image", "key": str(n), "exact": n < 4 * share, "loss": 2.0,
         "tokens": 2, "experts": {"0": [1, 2, 0, 1], "2": [0, 4, 0, 0]}}
        for n in range(4)
    ]  # fmt: skip
    path = run.evaluation(name, "test")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in records))


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunDirectory]:
    """Killed after seven steps, continued from the checkpoint after four, done after nine."""
    folder = tmp_path_factory.mktemp("mirrored")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(folder))
        for name in ("WANDB_API_KEY", "WANDB_MODE"):
            patch.delenv(name, raising=False)
        run = RunDirectory(folder / "recorded")
        chosen = recipe(folder, "logging=wandb", "logging.tensorboard.enabled=true")
        answer(run, "before", 0.25)
        train(run, chosen, 0, 7, close=False)
        train(run, chosen, 4, 9)
        yield run


def history(path: Path) -> tuple[str, list[dict[str, Any]]]:
    """Identity and history of an offline file of wandb."""
    from wandb.proto import wandb_internal_pb2

    identity, rows = "", []
    for data in log_records(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "run":
            identity = record.run.run_id
        elif record.WhichOneof("record_type") == "history":
            items = {
                item.key or "/".join(item.nested_key): json.loads(item.value_json)
                for item in record.history.item
            }
            rows.append({**items, "_at": record.history.step.num})
    return identity, rows


def log_records(data: bytes) -> Iterator[bytes]:
    """Records of a LevelDB log: blocks of 32 KiB, after 7 bytes of wandb's own."""
    at, parts = 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        parts += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):
            yield parts
            parts = b""


def offline_files(run: RunDirectory) -> list[Path]:
    return sorted(
        (run.mirrors / "wandb").glob("offline-run-*/*.wandb"), key=lambda p: p.stat().st_ctime
    )


def test_wandb_shows_what_the_directory_holds(both: RunDirectory) -> None:
    _, rows = history(offline_files(both)[-1])
    shown = {row["step"]: row for row in rows}
    lines = read_lines(both.metrics_file)
    assert [line["step"] for line in lines] == list(range(1, 10))
    for line in lines:
        row = shown[line["step"]]
        for name in ("loss", "loss/image", "loss/speech", "lr", "grad_norm", "mfu"):
            assert row[name] == line[name]
    for line in read_lines(both.validation_file):
        row = shown[line["step"]]
        assert row["validation/loss"] == line["loss"]
        assert row["validation/loss/image"] == line["loss/image"]
        assert row["routing/validation/_type"] == "image-file"
    assert [shown[4][f"router/load/0/{name}"] for name in EXPERTS] == [0.1, 0.2, 0.3, 0.4]
    assert shown[4]["router/groups/0/image/base"] == 0.7
    assert shown[4]["router/dead"] == 1
    assert shown[0]["before/exact/img"] == 0.25
    assert shown[9]["after/exact/img"] == 0.75
    assert shown[9]["routing/after/_type"] == "image-file"


def test_a_continued_run_is_the_same_run_at_wandb(both: RunDirectory) -> None:
    files = offline_files(both)
    assert len(files) == 2
    (one, first), (other, second) = history(files[0]), history(files[1])
    assert one == other == json.loads((both.mirrors / "wandb.json").read_text())["identity"]
    assert [row["step"] for row in first] == list(range(8))
    # wandb sync lets the last file replace the others: it has every step, once and in order.
    assert [row["step"] for row in second] == list(range(10))
    for rows in (first, second):
        places = [row["_at"] for row in rows]
        assert places == sorted(set(places))


def test_event_files_show_what_the_directory_holds(both: RunDirectory) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert len(list((both.mirrors / "tensorboard").iterdir())) == 2
    shown = EventAccumulator(str(both.mirrors / "tensorboard"), size_guidance={"images": 0})
    shown.Reload()
    lines = read_lines(both.metrics_file)
    for name in ("loss", "loss/image", "lr"):
        points = [(point.step, point.value) for point in shown.Scalars(name)]
        assert [step for step, _ in points] == list(range(1, 10))
        assert points == [(x["step"], float(np.float32(x[name]))) for x in lines]
    held_out = read_lines(both.validation_file)
    points = [(point.step, point.value) for point in shown.Scalars("validation/loss")]
    assert points == [(x["step"], float(np.float32(x["loss"]))) for x in held_out]
    assert [image.step for image in shown.Images("routing/validation")] == [3, 6, 9]
    assert [image.step for image in shown.Images("routing/after")] == [9]
    assert [point.value for point in shown.Scalars("before/exact/img")] == [0.25]


class Recorded:
    """A mirror that keeps what it is shown, and may fail or hang."""

    name = "recorded"

    def __init__(self, fails_at: int = 10**9, held: int | None = None) -> None:
        self.fails_at, self.held = fails_at, held
        self.opened: list[int] = []
        self.steps: list[int] = []
        self.flushes = 0

    def open(self, identity: str, step: int) -> int:
        self.opened.append(step)
        return step if self.held is None else self.held

    def write(self, row: Row) -> None:
        if row.step >= self.fails_at:
            raise OSError("no space left\nsecond line")
        self.steps.append(row.step)

    def show(self, step: int, name: str, picture: Any) -> None: ...
    def close(self) -> None: ...

    def flush(self) -> None:
        self.flushes += 1


@pytest.fixture
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    def use(*shown: Recorded) -> tuple[RunDirectory, Recipe]:
        monkeypatch.setattr(mirrors, "mirrors_of", lambda *_: list(shown))
        return RunDirectory(tmp_path / "recorded"), recipe(tmp_path)

    return use


def test_a_failing_mirror_is_told_once_and_does_no_harm(
    recorded: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    mirror = Recorded(fails_at=4)
    run, chosen = recorded(mirror)
    train(run, chosen, 0, 9)
    assert mirror.steps == [1, 2, 3]
    assert [line["step"] for line in read_lines(run.metrics_file)] == list(range(1, 10))
    (event,) = read_lines(run.path / "events.jsonl")
    assert (event["event"], event["mirror"]) == ("mirror failed", "recorded")
    assert event["reason"] == "OSError: no space left"
    assert capsys.readouterr().err == (
        "recorded: the recorded mirror is off, the run goes on: OSError: no space left\n"
    )
    # The next process makes up for what it missed.
    again = Recorded()
    run, chosen = recorded(again)
    train(run, chosen, 7, 9)
    assert again.opened == [3]
    assert again.steps == [4, 5, 6, 7, 8, 9, 9]  # the last one is the evaluation


def test_a_mirror_that_hangs_does_not_hold_the_run(
    recorded: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Hanging(Recorded):
        def open(self, identity: str, step: int) -> int:
            let_go.wait(30)
            return step

    let_go = threading.Event()
    monkeypatch.setattr(mirrors, "CLOSING_SECONDS", 0.2)
    run, chosen = recorded(Hanging())
    train(run, chosen, 0, 9)
    let_go.set()
    assert "did not finish within 0 s" in capsys.readouterr().err
    assert len(read_lines(run.path / "events.jsonl")) == 1
    assert len(read_lines(run.metrics_file)) == 9


def test_the_run_waits_once_for_all_mirrors(recorded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Hanging(Recorded):
        def close(self) -> None:
            let_go.wait(30)

    let_go = threading.Event()
    monkeypatch.setattr(mirrors, "CLOSING_SECONDS", 1.0)
    late = Recorded()
    every = [Hanging(), Hanging(), Hanging(), late]
    for number, mirror in enumerate(every):
        mirror.name = f"mirror {number}"
    run, chosen = recorded(*every)
    told = train(run, chosen, 0, 2, close=False, last_words=False)  # no pictures yet
    began = time.monotonic()
    told.close()
    waited = time.monotonic() - began
    let_go.set()
    assert 1 <= waited < 2.9
    assert len(read_lines(run.path / "events.jsonl")) == 3
    assert late.steps == [1, 2]


def test_a_mirror_that_is_behind_catches_up_at_once(
    recorded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither disk nor mirror is made to wait for every single step."""

    class Slow(Recorded):
        def open(self, identity: str, step: int) -> int:
            let_go.wait(30)
            return super().open(identity, step)

    let_go = threading.Event()
    marks: list[int] = []
    write_mark = mirrors.Follower._write_mark

    def counted(self: Any) -> None:
        if self._mirror is mirror:
            marks.append(self._mark.step)
        write_mark(self)

    monkeypatch.setattr(mirrors.Follower, "_write_mark", counted)
    monkeypatch.setattr(mirrors, "MARK_SECONDS", 3600.0)
    mirror = Slow()
    run, chosen = recorded(mirror)
    told = train(run, chosen, 0, 8, close=False, last_words=False)
    let_go.set()
    told.close()
    assert mirror.steps == list(range(1, 9))
    assert marks[0] == 0
    assert marks[-1] == 8
    assert len(marks) <= 4  # not one a step
    assert mirror.flushes == len(marks) - 1


def test_a_mark_is_written_while_no_step_comes(
    recorded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirrors, "MARK_SECONDS", 0.3)
    run, chosen = recorded(Recorded())
    told = train(run, chosen, 0, 8, close=False, last_words=False)
    until = time.monotonic() + 20
    while _marked(run) < 8 and time.monotonic() < until:
        time.sleep(0.05)
    assert _marked(run) == 8
    told.close()


def _marked(run: RunDirectory) -> int:
    path = run.mirrors / "recorded.json"
    return int(json.loads(path.read_text())["step"]) if path.is_file() else 0


def test_steps_that_a_mirror_holds_are_not_shown_again(recorded: Any) -> None:
    """Online wandb says where it stopped."""
    run, chosen = recorded(Recorded())
    train(run, chosen, 0, 7, close=False)
    mirror = Recorded(held=7)
    run, chosen = recorded(mirror)
    train(run, chosen, 4, 9)
    assert mirror.opened == [4]
    assert mirror.steps == [8, 9, 9]
    done = Recorded()
    run, chosen = recorded(done)
    train(run, chosen, 9, 9)
    assert done.opened == []  # nothing is left to show


def test_other_ranks_mirror_nothing(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "recorded", writes=False)
    told = Mirrors(run, recipe(tmp_path, "logging=wandb"))
    told.start(0)
    told.step(SimpleNamespace(step=1))  # type: ignore[arg-type]
    told.close()
    assert not run.path.exists()


def test_online_needs_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(RuntimeError, match="no API key: log in"):
        mirror_wandb._mode("online")
    assert mirror_wandb._mode("auto") == "offline"
    monkeypatch.setenv("WANDB_MODE", "online")
    assert (mirror_wandb._mode("auto"), mirror_wandb._mode("offline")) == ("online", "offline")


def test_a_package_that_is_not_installed_is_refused_before_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    check_mirrors(recipe(tmp_path).logging)
    with pytest.raises(UserError, match=r"pip install wandb tensorboard"):
        check_mirrors(recipe(tmp_path, "logging=wandb", "logging.tensorboard.enabled=true").logging)
    from unimoe_mcore.compose import prepare_run

    with pytest.raises(UserError, match=r"logging.tensorboard.enabled=true cannot be had"):
        prepare_run(recipe(tmp_path, "logging=tensorboard"))
    assert not (tmp_path / "recorded").exists()


def test_neither_package_is_needed_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("wandb", "tensorboard", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)
    for module in (mirror_wandb, mirror_tensorboard):
        importlib.reload(module)


def test_what_other_settings_left_is_forgotten(both: RunDirectory, tmp_path: Path) -> None:
    copy = RunDirectory(tmp_path / "recorded")
    shutil.copytree(both.path, copy.path, symlinks=True)
    copy.forget()
    assert not copy.mirrors.exists()


def test_experts_are_called_by_their_runs() -> None:
    assert expert_names(["base", "r/stage2-image/gives", "r/stage2-image", "own"]) == [
        "base", "image", "image-2", "own",
    ]  # fmt: skip


def test_the_picture_has_a_panel_for_every_block() -> None:
    shares = {"image": [0.9, 0.1], "text": [0.5, 0.5]}
    one = draw_routing({"1": shares}, ["a", "b"], "step 1")
    five = draw_routing({str(block): shares for block in range(5)}, ["a", "b"], "step 1")
    assert one.dtype == np.uint8
    assert one.shape[2] == 3
    assert five.shape[0] > 1.5 * one.shape[0]
    assert five.shape[1] > 2.5 * one.shape[1]
    assert (one < 128).any()  # dark cells
