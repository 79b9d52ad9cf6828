"""What ranks read: exactly the plan, whatever the ranks, workers, dealing, stops and kills."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from data_pipeline.planning.timeline import PlanState
from data_pipeline.reading.collate import MicroBatch, collate
from data_pipeline.reading.loader import ReadStep
from tests.data_pipeline.cases_loading import CAPACITY, STEPS, keys, loaders, planned
from tests.workspace import build_data

WAYS = [("mixed", "balanced"), ("mixed", "sharded"), ("uniform", "balanced")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny world's shards."""
    place = tmp_path_factory.mktemp("world")
    build_data(place / "data" / "tiny")
    return place


def batches(step: ReadStep) -> list[MicroBatch]:
    return [collate(samples, 0, 32) for samples in step.microbatches]


def assert_same(ours: list[MicroBatch], theirs: list[MicroBatch]) -> None:
    """Bitwise the same tensors and decoded media."""
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        for name, value in vars(one).items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, getattr(other, name)), name
        for modality, media in one.media.items():
            for mine, yours in zip(media, other.media[modality], strict=True):
                assert mine.data == yours.data
                assert mine.content is not None
                assert mine.content.dtype == yours.content.dtype
                assert mine.content.tobytes() == yours.content.tobytes()


@pytest.mark.parametrize(("compose", "deal"), WAYS)
def test_batches_after_a_restart_are_those_of_an_uninterrupted_run(
    folder: Path, compose: str, deal: str
) -> None:
    with ExitStack() as stack:
        whole, timeline = loaders(folder, stack, 2, 0, compose, deal)
        expected = [[batches(loader.read(step)) for loader in whole] for step in range(STEPS)]
        states = [timeline.state(step).to_json() for step in range(STEPS)]
    for stop, workers in ((5, 2), (STEPS - 1, 1)):
        state = PlanState.from_json(json.loads(json.dumps(states[stop])))
        with ExitStack() as stack:
            rest, _ = loaders(folder, stack, 2, workers, compose, deal, state)
            for step in range(stop, STEPS):
                for loader, wanted in zip(rest, expected[step], strict=True):
                    assert_same(batches(loader.read(step)), wanted)


@pytest.mark.parametrize(("compose", "deal"), WAYS)
@pytest.mark.parametrize("ranks", [1, 3, 8])
def test_all_ranks_together_read_exactly_the_plan(
    folder: Path, compose: str, deal: str, ranks: int
) -> None:
    with ExitStack() as stack:
        found, _ = loaders(folder, stack, ranks, 0, compose, deal)
        for step, wanted in enumerate(planned(folder, compose)):
            read = [loader.read(step) for loader in found]
            assert keys(read) == wanted
            assert len({len(each.microbatches) for each in read}) == 1
            assert not any(each.broken for each in read)
            for each in read:
                for samples in each.microbatches:
                    assert sum(len(s.tokens.ids) for s in samples) <= CAPACITY


def test_a_run_killed_at_any_moment_goes_on_with_other_ranks_and_workers(
    folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "data").symlink_to(folder / "data")
    rng, wanted = random.Random(5), list(planned(folder))
    saved = tmp_path / "state.json"
    kills = 0
    for _ in range(40):
        ranks, deal = rng.choice([1, 2, 5]), rng.choice(["balanced", "sharded"])
        arguments = [str(tmp_path), str(ranks), str(rng.choice([0, 2])), deal]
        command = [sys.executable, "-m", "tests.data_pipeline.cases_loading", *arguments]
        with subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True) as process:
            begun = saved.read_text() if saved.is_file() else ""
            deadline = time.monotonic() + 60
            # Wait for progress, so that the test ends; then kill at a random moment.
            while process.poll() is None and time.monotonic() < deadline:
                if saved.is_file() and saved.read_text() != begun:
                    time.sleep(rng.random() * 0.2)
                    os.killpg(process.pid, signal.SIGKILL)
                    break
                time.sleep(0.01)
            process.wait(timeout=60)
            assert process.returncode in (0, -signal.SIGKILL), process.stderr.read().decode()
        if process.returncode == 0:
            break
        kills += 1
    assert process.returncode == 0
    assert kills > 1, "it was hardly ever killed"
    for step, names in enumerate(wanted):
        logs = [json.loads(p.read_text()) for p in (tmp_path / "read").glob(f"{step}-*.json")]
        assert logs, f"step {step} was never read"
        assert all(log == names for log in logs)
