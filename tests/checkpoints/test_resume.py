"""A launch is killed at any moment and started again: the same losses, nothing left behind."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.conftest import World
from tests.distributed import REPOSITORY
from tests.training.cases_stages import LONG_RUN
from tests.workspace import branch, overrides
from unimoe_mcore import launch
from unimoe_mcore.compose import prepare_run
from unimoe_mcore.config.composition import compose_recipe
from unimoe_mcore.config.errors import UserError
from unimoe_mcore.runtime.run_directory import read_lines

PATIENCE = 90.0
"""Seconds; a launch takes about 10 on two idle cores."""


@pytest.fixture(scope="module")
def folder(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return branch(world.folder, tmp_path_factory.mktemp("killed"), "base", "stage1")


def arguments(folder: Path, *extra: str) -> list[str]:
    recipe, *own = LONG_RUN
    return [recipe, *overrides(folder), *own, "name=killed", *extra]


def start(folder: Path, log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "unimoe_mcore.launch", *arguments(folder)],
            cwd=REPOSITORY,
            env=os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def workers(folder: Path) -> list[psutil.Process]:
    """The processes that train this run, by the file they were started with."""
    found = []
    for process in psutil.process_iter():
        try:
            if str(folder / "runs/killed/config.yaml") in process.cmdline():
                found.append(process)
        except psutil.Error:  # gone meanwhile, or a zombie
            continue
    return found


def until(condition: Callable[[], bool], seconds: float, what: str) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, f"no {what} after {seconds:.0f} s"
        time.sleep(0.01)


def steps(run: Path) -> int:
    path = run / "metrics.jsonl"
    return len(read_lines(path)) if path.is_file() else 0


def kill(launcher: subprocess.Popen[bytes], folder: Path, log: Path) -> None:
    """Kill the launcher, and nothing but it, while it has two processes."""
    assert launcher.poll() is None, f"it was over before it could be killed: {log.read_text()}"
    assert len(workers(folder)) == 2
    launcher.send_signal(signal.SIGKILL)
    launcher.wait()
    until(lambda: not workers(folder), 5, "end of the processes")


@pytest.fixture(scope="module")
def killed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The directory of a run that was killed while it started, killed while it trained, and ended.

    While it trained, another launch of it was tried.
    """
    run, log = folder / "runs/killed", tmp_path_factory.mktemp("log") / "launch.log"
    launcher = start(folder, log)
    try:
        until(lambda: len(workers(folder)) == 2, PATIENCE, "processes")
        time.sleep(random.uniform(0, 3))  # importing, or waiting for one another
        kill(launcher, folder, log)

        launcher = start(folder, log)
        until(lambda: steps(run) >= 4, PATIENCE, "fourth step")
        with pytest.raises(UserError, match="killed is in use: another process trains this run"):
            launch.main(arguments(folder))
        time.sleep(random.uniform(0, 0.3))  # a step, a checkpoint, or between them
        kill(launcher, folder, log)
        assert 4 <= steps(run) < 40

        launcher = start(folder, log)
        assert launcher.wait(PATIENCE) == 0, log.read_text()
        assert "continues from step" in log.read_text()
        yield run
    finally:
        launcher.kill()
        launcher.wait()


def test_a_killed_run_ends_with_the_losses_of_one_that_was_not(killed: Path, world: World) -> None:
    lines = read_lines(killed / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 41))
    assert [line["loss"] for line in lines] == world.losses["long"]


def test_it_gives_the_same_weights(killed: Path, world: World) -> None:
    for name in ("rank-00000.safetensors", "rank-00001.safetensors"):
        expected = world.folder / "runs/long/gives" / name
        assert (killed / "gives" / name).read_bytes() == expected.read_bytes()


def test_every_checkpoint_is_in_the_event_log(killed: Path) -> None:
    saved = [e for e in read_lines(killed / "events.jsonl") if e["event"] == "saved"]
    assert [event["step"] for event in saved][-2:] == [39, 40]
    for event in saved:
        assert event["stopped"] > 0
        assert event["writing"] > 0
        assert event["bytes"] > 1e5


def test_nothing_half_written_is_left(killed: Path) -> None:
    assert [path for path in killed.rglob("*") if "partial" in path.name] == []
    kept = sorted(path.name for path in (killed / "checkpoints").iterdir())
    assert kept == ["best.json", "step-00000039", "step-00000040"]


def snapshot(run: Path) -> dict[str, tuple[bytes, int]]:
    """Content and time of every file, but for those that only say who was here."""
    return {
        str(path.relative_to(run)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in run.rglob("*")
        if path.is_file() and path.name not in (".lock", "config.yaml")
    }


def test_a_launch_of_a_finished_run_changes_nothing(
    killed: Path, folder: Path, tmp_path: Path
) -> None:
    before, config = snapshot(killed), (killed / "config.yaml").read_text()
    assert start(folder, tmp_path / "log").wait(PATIENCE) == 0
    assert (tmp_path / "log").read_text() == "killed: done before\n"
    assert snapshot(killed) == before
    assert (killed / "config.yaml").read_text() == config


def test_another_recipe_is_not_continued(killed: Path, folder: Path) -> None:
    config = (killed / "config.yaml").read_text()
    with pytest.raises(UserError) as refused:
        launch.main(arguments(folder, "trainer.lr=5e-4", "data.seed=1"))
    assert "(data.seed 0 -> 1; trainer.lr 0.001 -> 0.0005)" in str(refused.value)
    assert "give this run another name (name=killed-2) or delete" in str(refused.value)
    assert (killed / "config.yaml").read_text() == config


def test_what_does_not_change_the_numbers_may_change(killed: Path, folder: Path) -> None:
    before = (killed / "config.yaml").read_text()
    recipe = compose_recipe(
        "stage2", arguments(folder, "trainer.keep=3", "parallel.processes=1")[1:]
    )
    assert prepare_run(recipe).read_text() == before.replace("keep: 2", "keep: 3").replace(
        "processes: 2", "processes: 1"
    )
