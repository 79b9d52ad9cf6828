"""The job scripts against a real Slurm, up to the point where training would start."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed import REPOSITORY
from tests.slurm.lab import SlurmLab

STAGES = ("slurm/base.sh", "slurm/stage1.sh", "slurm/stage2.sh", "slurm/stage3.sh")


def test_shellcheck(slurm: SlurmLab) -> None:
    scripts = [
        str(path.relative_to(REPOSITORY))
        for folder in ("slurm", "tests/slurm")
        for path in sorted((REPOSITORY / folder).rglob("*.sh"))
    ]
    assert set(STAGES) < set(scripts)
    checked = slurm.run("shellcheck", "--external-sources", *scripts, cwd=REPOSITORY)
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize("script", STAGES)
def test_slurm_would_accept_it(script: str, slurm: SlurmLab) -> None:
    for options in ((), ("--nodes=2", "--gpus-per-node=4", "--cpus-per-task=8", "--time=30:00")):
        answer = slurm.run("sbatch", "--test-only", *options, script, cwd=REPOSITORY)
        assert answer.returncode == 0, answer.stderr
        assert "to start at" in answer.stderr


def test_slurm_would_refuse_what_it_does_not_have(slurm: SlurmLab) -> None:
    for options, reason in (
        (("--nodes=3",), "Node count specification invalid|configuration is not available"),
        (("--gpus-per-node=5",), "configuration is not available"),
    ):
        answer = slurm.run("sbatch", "--test-only", *options, STAGES[0], cwd=REPOSITORY)
        assert answer.returncode == 1, answer.stderr
        assert any(words in answer.stderr for words in reason.split("|"))


def test_a_wrong_override_ends_the_job_with_one_sentence(slurm: SlurmLab, tmp_path: Path) -> None:
    log, runs = tmp_path / "job.log", tmp_path / "runs"
    number = slurm.submit(
        f"--output={log}", "slurm/stage2.sh", "stage.expert=speech", "trainer.steps=many",
        f"paths.runs={runs}", cwd=REPOSITORY,
    )  # fmt: skip
    job = slurm.wait(number)
    assert (job.state, job.exit_code) == ("FAILED", 2)
    (line,) = log.read_text().splitlines()
    assert line.startswith("error: ")
    assert "trainer.steps" in line
    assert not runs.exists()


def test_the_recipe_is_checked_against_the_size_of_the_job(slurm: SlurmLab, tmp_path: Path) -> None:
    log = tmp_path / "job.log"
    number = slurm.submit(
        f"--output={log}", "--nodes=2", "--gpus-per-node=3", "slurm/stage3.sh",
        "parallel.expert=4", cwd=REPOSITORY,
    )  # fmt: skip
    job = slurm.wait(number)
    assert (job.state, job.exit_code) == ("FAILED", 2)
    assert "which do not divide 6 processes" in log.read_text()


def test_an_array_is_one_expert_each(slurm: SlurmLab, tmp_path: Path) -> None:
    number = slurm.submit(
        "--array=0-3", f"--output={tmp_path}/%a.log", "slurm/stage2.sh",
        "trainer.precision=${stage.expert}", cwd=REPOSITORY,
    )  # fmt: skip
    for index, expert in enumerate(("image", "speech", "audio")):
        assert slurm.wait(f"{number}_{index}").exit_code == 2
        log = (tmp_path / f"{index}.log").read_text()
        assert f"trainer.precision is '{expert}'" in log  # the recipe was this expert's
    assert slurm.wait(f"{number}_3").exit_code == 2
    assert "there is no expert 3" in (tmp_path / "3.log").read_text()


@pytest.mark.parametrize(
    ("cwd", "environment", "message"),
    [
        ("recipes", {}, "submit it from the repository's root, not from"),
        (".", {"VENV": "/nowhere"}, "there is no Python at /nowhere/bin/python"),
    ],
)
def test_a_wrong_set_up_is_said(
    cwd: str, environment: dict[str, str], message: str, slurm: SlurmLab, tmp_path: Path
) -> None:
    log = tmp_path / "job.log"
    number = slurm.submit(
        f"--output={log}", str(REPOSITORY / "slurm/stage1.sh"), cwd=REPOSITORY / cwd,
        env=environment,
    )  # fmt: skip
    assert slurm.wait(number).exit_code == 2
    (line,) = log.read_text().splitlines()
    assert message in line


def test_without_slurm_the_way_out_is_named(slurm: SlurmLab) -> None:
    ended = slurm.run("bash", "slurm/stage1.sh", cwd=REPOSITORY)
    assert ended.returncode == 2
    assert "python -m unimoe_mcore.launch stage1" in ended.stderr
