"""The command that fills the feature cache: who reads what, and what happens when one fails."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import replace
from itertools import chain
from pathlib import Path

import psutil
import pytest

from data_pipeline.modalities import tower_modalities
from data_pipeline.reading.records import RecordReader
from data_pipeline.shards.index import load_manifest
from tests.workspace import build_data, overrides
from unimoe_mcore.config.composition import compose_recipe
from unimoe_mcore.config.recipe import Recipe
from unimoe_mcore.encode import BATCH, Share, encode_share


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny world's shards; the folder above holds ``data/tiny``."""
    folder = tmp_path_factory.mktemp("world")
    build_data(folder / "data" / "tiny")
    return folder


@pytest.fixture
def recipe(data: Path, tmp_path: Path) -> Recipe:
    composed = compose_recipe("stage1", overrides(data))
    return replace(composed, paths=replace(composed.paths, cache=str(tmp_path / "cache")))


def test_shares_divide_the_media_and_read_only_their_own(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = load_manifest(data / "data" / "tiny")
    read: list[str] = []
    original = RecordReader.media

    def media(self, shard, sample):
        read.append(sample.key)
        return original(self, shard, sample)

    monkeypatch.setattr(RecordReader, "media", media)
    modalities = tower_modalities("image")
    whole = [medium.source for medium in Share(manifest, modalities, 0, 1)]
    assert len(whole) == len(Share(manifest, modalities, 0, 1)) == 3 * 39 + 39  # img_left has two
    read.clear()
    shares = [Share(manifest, modalities, process, 3) for process in range(3)]
    assert not read  # the index is enough to know how many there are
    lengths = [len(share) for share in shares]
    first = next(iter(shares[0]))
    assert read == [first.source.split(":")[1].split(".")[0]]
    parts = [[medium.source for medium in share] for share in shares]
    assert [len(part) for part in parts] == lengths
    assert sorted(chain(*parts)) == sorted(whole)


def test_everything_is_encoded_once_and_progress_is_told(
    recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = encode_share(recipe, 0, 2), encode_share(recipe, 1, 2)
    assert first > BATCH
    assert second > BATCH
    lines = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    assert {line[0] for line in lines} == {"encode image", "encode speech", "encode audio"}
    for line in lines:
        done, total = line[1].split("/")
        assert int(done) <= int(total)
    assert encode_share(recipe, 0, 1) == 0  # all there


def run(recipe: Recipe, data: Path, *extra: str) -> subprocess.Popen[str]:
    """The command, on the tiny world and this recipe's cache."""
    arguments = [*overrides(data), f"paths.cache={recipe.paths.cache}", *extra]
    return subprocess.Popen(
        [sys.executable, "-m", "unimoe_mcore.encode", "stage1", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_failing_process_says_one_sentence(recipe: Recipe, data: Path) -> None:
    Path(recipe.paths.cache).write_text("a file where the cache's folder must go")
    command = run(recipe, data)
    _, errors = command.communicate(timeout=120)
    assert command.returncode == 2
    (sentence,) = errors.splitlines()
    assert sentence.startswith("error: The feature cache cannot write")


def test_a_process_ends_with_the_one_that_started_it(
    recipe: Recipe, data: Path, tmp_path: Path
) -> None:
    pipe = tmp_path / "manifest.json"
    os.mkfifo(pipe)  # whoever reads it waits for as long as it is open for writing
    command = run(recipe, data, f"data.folder={tmp_path}", "parallel.processes=1")
    held = opened(pipe, within=100)
    children = psutil.Process(command.pid).children()
    (worker,) = [child for child in children if "spawn_main" in "".join(child.cmdline())]
    command.kill()
    _, alive = psutil.wait_procs([worker], timeout=20)
    os.close(held)
    command.communicate(timeout=20)
    assert not alive


def opened(pipe: Path, within: float) -> int:
    """The pipe, open for writing, once somebody reads it."""
    deadline = time.monotonic() + within
    while True:
        try:
            return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:  # ENXIO: nobody reads it yet
            if time.monotonic() > deadline:
                raise
        time.sleep(0.05)
