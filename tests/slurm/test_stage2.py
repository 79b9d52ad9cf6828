"""Stage 2 as a user submits it, on a real Slurm: two processes, all of the training."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from tests.conftest import World
from tests.distributed import REPOSITORY
from tests.slurm.lab import SlurmLab
from tests.workspace import branch, overrides
from unimoe_mcore.config.composition import load
from unimoe_mcore.runtime.run_directory import read_lines


@pytest.fixture
def folder(world: World, tmp_path: Path) -> Path:
    return branch(world.folder, tmp_path / "a world", "base", "stage1")  # with a space in its name


def submit(slurm: SlurmLab, folder: Path, options: list[str], *extra: str) -> str:
    return slurm.submit(
        *options, "slurm/stage2.sh", "stage.expert=speech", *overrides(folder), *extra,
        cwd=REPOSITORY, env={"VENV": sys.prefix},
    )  # fmt: skip


def test_a_submitted_stage_gives_its_expert(
    slurm: SlurmLab, folder: Path, world: World, tmp_path: Path
) -> None:
    log, run = tmp_path / "job.log", folder / "runs/stage2-speech"
    job = slurm.wait(submit(slurm, folder, [f"--output={log}"], "trainer.lr=2e-3"), timeout=180)
    assert (job.state, job.exit_code) == ("COMPLETED", 0), log.read_text()
    assert json.loads((run / "gives/manifest.json").read_text())["expert"] == "speech"
    recipe = load(run / "config.yaml")
    assert recipe.trainer.lr == 2e-3
    assert recipe.paths.data == f"{folder}/data"
    assert recipe.model.towers["speech"].encoder.name == "random_sound"
    lines = read_lines(run / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert lines[0]["loss"] == world.losses["stage2-speech"][0]
    assert lines[-1]["loss"] != world.losses["stage2-speech"][-1]  # the other learning rate
    assert json.loads((run / "events.jsonl").read_text().splitlines()[0])["ranks"] == 2
    assert "1 nodes x 2 processes" in log.read_text()


def test_a_stage_on_damaged_weights_fails_with_one_sentence(
    slurm: SlurmLab, folder: Path, tmp_path: Path
) -> None:
    """What only the training finds out, and every process does, on both nodes."""
    (folder / "runs/base/gives/rank-00000.safetensors").write_bytes(b"no weights")
    log = tmp_path / "job.log"
    options = [f"--output={log}", "--nodes=2", "--cpus-per-task=1"]
    job = slurm.wait(submit(slurm, folder, options), timeout=180)
    text = log.read_text()
    assert (job.state, job.exit_code) == ("FAILED", 2), text
    (said,) = re.findall("^[01]: error: (.*)", text, re.MULTILINE)
    assert said.startswith(f"{folder}/runs/base/gives/rank-00000.safetensors is damaged")
    assert "Traceback" not in text
