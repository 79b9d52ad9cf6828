"""A stage whose parts are missing or do not fit is refused in one sentence before step one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.errors import DataError
from data_pipeline.shards.integrity import verify
from tests.conftest import World
from tests.distributed import REPOSITORY
from tests.workspace import branch, build_data, overrides
from unimoe_mcore.checkpoints.artefact import TOKENIZER, read_manifest, seal
from unimoe_mcore.checkpoints.sources import find_sources
from unimoe_mcore.config.composition import compose_recipe
from unimoe_mcore.config.errors import UserError

GIVEN = ("base", "stage1", "stage2-image", "stage2-speech", "stage2-audio")


@pytest.fixture
def runs(world: World, tmp_path: Path) -> Path:
    """Copies of what the runs of the tiny world gave."""
    return branch(world.folder, tmp_path / "world", *GIVEN) / "runs"


def sources(runs: Path, recipe: str, *extra: str) -> Any:
    """What a stage would be filled from; raises what it would be refused with."""
    return find_sources(compose_recipe(recipe, [*overrides(runs.parent), *extra]))


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    facts = json.loads(path.read_text())
    change(facts)
    path.write_text(json.dumps(facts))


def test_what_fits_is_found(runs: Path) -> None:
    found = sources(runs, "stage3", "stage.connectors.audio=${paths.runs}/stage1/gives")
    assert found.base.kind == "base"
    assert found.experts == [None, *(runs / name / "gives" for name in GIVEN[2:])]
    assert found.connectors == {
        "image": runs / "stage2-image/gives",
        "speech": runs / "stage2-speech/gives",
        "audio": runs / "stage1/gives",
    }
    assert sources(runs, "stage2").connectors["image"] == runs / "stage1/gives"
    assert sources(runs, "stage1").connectors == {}


def gone(run: str) -> Callable[[Path], None]:
    return lambda runs: shutil.rmtree(runs / run)


def edited(run: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    return lambda runs: edit(runs / run / "gives" / "manifest.json", change)


def retrained(runs: Path) -> None:
    """The base with another tokenizer."""
    folder = runs / "base" / "gives"
    facts = read_manifest(folder, "the base")
    with (folder / TOKENIZER).open("a") as file:
        file.write(" ")
    seal(folder, replace(facts, stands_on=""))


def nothing(runs: Path) -> None: ...


OTHER_TOWER = "model.towers.image.connector.max_tokens=4"
REFUSED: dict[str, tuple[Callable[[Path], None], list[str], str]] = {
    "no base": (
        gone("base"),
        ["stage1"],
        "The base (stage.base) is missing: there is no {runs}/base/gives/manifest.json; run the "
        "stage that gives it first.",
    ),
    "no stage 1": (
        gone("stage1"),
        ["stage2"],
        "stage.start is missing: there is no {runs}/stage1/gives/manifest.json; run the stage that "
        "gives it first.",
    ),
    "no expert": (
        gone("stage2-speech"),
        ["stage3"],
        "The expert stage.experts[2] is missing: there is no "
        "{runs}/stage2-speech/gives/manifest.json",
    ),
    "a stage 1 that was killed": (
        lambda runs: (runs / "stage1/gives").rename(runs / "stage1/.partial-gives"),
        ["stage2"],
        "stage.start is missing",
    ),
    "half a manifest": (
        lambda runs: os.truncate(runs / "base/gives/manifest.json", 100),
        ["stage1"],
        "base/gives/manifest.json cannot be read",
    ),
    "a manifest of a later version": (
        edited("base", lambda facts: facts.update(format=2)),
        ["stage1"],
        "base/gives/manifest.json has format 2, this version reads 1.",
    ),
    "a manifest with something missing": (
        edited("base", lambda facts: facts.pop("stands_on")),
        ["stage1"],
        "base/gives/manifest.json cannot be read",
    ),
    "a start on another base": (
        edited("stage1", lambda facts: facts.update(stands_on="f" * 64)),
        ["stage2"],
        "{runs}/stage1/gives stands on base ffffffffffff, but the recipe's base {runs}/base/gives "
        "is ",
    ),
    "an expert on another base": (
        edited("stage2-audio", lambda facts: facts.update(stands_on="f" * 64)),
        ["stage3"],
        "{runs}/stage2-audio/gives stands on base ffffffffffff, but the recipe's base ",
    ),
    "a base that was trained again": (
        retrained,
        ["stage2"],
        ": retrain the part on this base or name the base it stands on.",
    ),
    "another hash": (
        edited("base", lambda facts: facts.update(hash="e" * 64)),
        ["stage1"],
        "base/gives/manifest.json is damaged: its tensors do not make its hash.",
    ),
    "another tokenizer": (
        lambda runs: (runs / "base/gives" / TOKENIZER).write_text("{}"),
        ["stage1"],
        "base/gives/tokenizer.json is missing or damaged: its checksum is not the manifest's.",
    ),
    "another run's weights": (
        lambda runs: shutil.copy(
            runs / "stage2-audio/gives/rank-00000.json", runs / "stage2-image/gives"
        ),
        ["stage3"],
        "stage2-image/gives/rank-00000.json is missing or damaged: its checksum is not the man",
    ),
    "a part of another layout": (
        lambda runs: shutil.copy(
            runs / "stage1/gives/rank-00000.json", runs / "stage1/gives/rank-00002.json"
        ),
        ["stage2"],
        "{runs}/stage1/gives has other index files than its manifest lists",
    ),
    "a connector from nowhere": (
        nothing,
        ["stage3", "stage.experts=[base,'${paths.runs}/stage2-image/gives']", "stage.start=''"],
        "The speech connector comes from nowhere: name the run that trained it with "
        "stage.start=FOLDER or stage.connectors.speech=FOLDER.",
    ),
    "a base of another shape": (
        nothing,
        ["stage1", "model.language.ffn=64", "model.language.blocks=4"],
        "The base {runs}/base/gives has another shape than model.language: blocks=2 (recipe: 4), "
        "ffn=48 (recipe: 64).",
    ),
    "an expert for a base": (
        nothing,
        ["stage1", "stage.base=${paths.runs}/stage2-image/gives"],
        "stage.base={runs}/stage2-image/gives was given by a stage of kind expert, it is no base.",
    ),
    "connectors for an expert": (
        nothing,
        ["stage3", "stage.experts=[base,'${paths.runs}/stage1/gives']"],
        "stage.experts[1]={runs}/stage1/gives was given by a stage of kind align, it is no expert.",
    ),
    "a connector that the run does not give": (
        nothing,
        ["stage3", "stage.connectors.image=${paths.runs}/stage2-speech/gives"],
        "{runs}/stage2-speech/gives has no image connector (it has speech): name another run with "
        "stage.connectors.image=FOLDER.",
    ),
    "two candidates for a connector": (
        lambda runs: shutil.copytree(runs / "stage2-image", runs / "again"),
        [
            "stage3",
            "stage.experts=['${paths.runs}/stage2-image/gives','${paths.runs}/again/gives']",
            "stage.start=${paths.runs}/stage1/gives",
        ],
        "The image connector could come from {runs}/again/gives or {runs}/stage2-image/gives: "
        "choose one with stage.connectors.image=FOLDER.",
    ),
    "another tower than the recipe's": (
        nothing,
        ["stage2", OTHER_TOWER],
        "The image tower of {runs}/stage1/gives differs from the recipe's: "
        "connector.max_tokens=8 there, 4 in the recipe.",
    ),
    "an expert's other tower": (
        nothing,
        ["stage3", OTHER_TOWER],
        "The image tower of {runs}/stage2-image/gives differs from the recipe's: ",
    ),
}


@pytest.mark.parametrize("wrong", REFUSED)
def test_what_does_not_fit_is_refused_in_one_sentence(wrong: str, runs: Path) -> None:
    change, recipe, words = REFUSED[wrong]
    change(runs)
    with pytest.raises(UserError) as refused:
        sources(runs, *recipe)
    sentence = str(refused.value)
    assert words.format(runs=runs) in sentence
    assert "\n" not in sentence
    assert sentence.endswith(".")


def test_two_candidates_with_a_choice_are_no_problem(runs: Path) -> None:
    shutil.copytree(runs / "stage2-image", runs / "again")
    found = sources(
        runs,
        "stage3",
        "stage.experts=['${paths.runs}/stage2-image/gives','${paths.runs}/again/gives']",
        "stage.start=${paths.runs}/stage1/gives",
        "stage.connectors.image=${paths.runs}/again/gives",
    )
    assert found.connectors["image"] == runs / "again/gives"
    assert found.connectors["speech"] == runs / "stage1/gives"


SHARD = "train/img_group/img_group-00000.tar"


def test_damaged_data_is_refused_in_one_sentence(tmp_path: Path) -> None:
    folder = build_data(tmp_path / "data")
    verify(folder)
    (folder / SHARD).rename(tmp_path / "moved.tar")
    with pytest.raises(DataError, match=f"shard .*{SHARD} is missing; restore it or build"):
        verify(folder)
    content = bytearray((tmp_path / "moved.tar").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / SHARD).write_bytes(content)
    with pytest.raises(DataError, match=f"shard .*{SHARD} is corrupted") as refused:
        verify(folder)
    assert "\n" not in str(refused.value)


def launch(runs: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "unimoe_mcore.launch", *arguments[:1],
         *overrides(runs.parent), *arguments[1:]],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=90,
    )  # fmt: skip


def says_only(ended: subprocess.CompletedProcess[str], words: str, printed: bool = False) -> None:
    """The launch failed with one sentence, said once, and with no other word.

    Args:
        printed: the training had begun, and printed its progress.
    """
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.startswith("error: "), ended.stderr
    assert words in ended.stderr
    assert len(ended.stderr.splitlines()) == 1, ended.stderr
    assert bool(ended.stdout) is printed


def test_a_launch_without_the_stage_before_says_so_once(runs: Path) -> None:
    """It is found out before any process starts."""
    shutil.rmtree(runs / "stage1")
    ended = launch(runs, "stage2", "stage.expert=speech")
    says_only(ended, f"stage.start is missing: there is no {runs}/stage1/gives/manifest.json")
    assert not (runs / "stage2-speech" / "metrics.jsonl").exists()


def test_an_error_of_every_process_is_said_once(runs: Path) -> None:
    """All processes read the base's weights."""
    with (runs / "base/gives/rank-00000.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    ended = launch(runs, "stage2", "stage.expert=speech")
    says_only(ended, "base/gives/rank-00000.safetensors is damaged: its checksum is not")


def test_an_error_of_one_process_ends_the_other_without_a_word(runs: Path) -> None:
    """A shard goes bad while nobody looks: who draws from it stops, the other one waits for it."""
    data = build_data(runs.parent / "broken")
    verify(data)
    status = (data / SHARD).stat()
    (data / SHARD).write_bytes(bytes(status.st_size))
    os.utime(data / SHARD, ns=(status.st_atime_ns, status.st_mtime_ns))
    extra = [f"data.folder={data}", "trainer.steps=8"]
    ended = launch(runs, "stage2", *extra)  # draws every picture at least once
    says_only(ended, f"{Path(SHARD).name} is of another tar", printed=True)
