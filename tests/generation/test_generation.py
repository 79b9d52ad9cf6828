"""A trained run is asked: as the evaluation does, with and without cache, alone and together."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from omegaconf import OmegaConf

from tests.conftest import Asked, World
from tests.distributed import REPOSITORY
from tests.generation.cases_generation import answers_of
from tests.generation.inline import decode_here
from unimoe_mcore.checkpoints.training import CheckpointFolder
from unimoe_mcore.config.errors import UserError
from unimoe_mcore.config.parallel import ParallelConfig
from unimoe_mcore.generation import prompt
from unimoe_mcore.generation.answering import load_model
from unimoe_mcore.generation.asked_run import AskedRun, open_run
from unimoe_mcore.generation.prompt import Attachment, make_prompt
from unimoe_mcore.generation.sampling import Sampling
from unimoe_mcore.model.towers.encoders.base import Encoder
from unimoe_mcore.model.unimoe import UniMoEModel
from unimoe_mcore.runtime import groups


@pytest.fixture(scope="module")
def run(asked: Asked) -> AskedRun:
    return open_run(asked.run)


@pytest.fixture(scope="module")
def collection() -> Iterator[ProcessGroupCollection]:
    yield groups.initialise(ParallelConfig())
    groups.destroy()


@pytest.fixture(scope="module")
def model(run: AskedRun, collection: ProcessGroupCollection) -> UniMoEModel:
    return load_model(run, collection)


@pytest.fixture(scope="module")
def alone(run: AskedRun, model: UniMoEModel, asked: Asked) -> list[dict[str, Any]]:
    return answers_of(run, model, asked.prompts)


@dataclass(frozen=True)
class Compared:
    """A run of one precision, and what it answers in this process with and without the cache."""

    asked: Asked
    alone: list[dict[str, Any]]
    uncached: list[dict[str, Any]]


@pytest.fixture(scope="module", params=("fp32", "bf16"))
def compared(
    request: pytest.FixtureRequest,
    asked_in: dict[str, Asked],
    collection: ProcessGroupCollection,
) -> Compared:
    asked = asked_in[request.param]
    run = open_run(asked.run)
    assert run.state.precision == request.param
    model = load_model(run, collection)
    with_cache, without = (answers_of(run, model, asked.prompts, cached=c) for c in (True, False))
    return Compared(asked, with_cache, without)


def test_answers_are_those_of_the_evaluation(compared: Compared) -> None:
    """An answer is exact in the record exactly where greedy decoding gives it."""
    asked = compared.asked
    lines = (asked.run / "evaluation/after.test.jsonl").read_text().splitlines()
    records = {record["key"]: record["exact"] for record in map(json.loads, lines)}
    judged = [records[f"{dataset}-{number:04d}"] for dataset, number, _ in asked.rows]
    found = [
        answer["text"] == right and answer["ended"] == "end"
        for answer, (_, _, right) in zip(compared.alone, asked.rows, strict=True)
    ]
    assert found == judged
    assert {True, False} == set(found), "one of both would prove little"


def test_the_evaluation_calls_every_answer_exact(compared: Compared) -> None:
    assert {answer["ended"] for answer in compared.asked.answers} == {"end"}
    assert all(compared.asked.exact)


def test_experts_on_two_processes_say_the_same(compared: Compared) -> None:
    for one, two in zip(compared.alone, compared.asked.answers, strict=True):
        assert one["tokens"] == two["tokens"]
        assert one["answer_experts"] == two["answer_experts"]
        assert one["question_experts"] == two["question_experts"]


def test_the_cache_changes_nothing(compared: Compared) -> None:
    assert compared.uncached == compared.alone


def test_logits_with_the_cache_are_those_without(model: UniMoEModel) -> None:
    from megatron.core.inference.contexts import StaticInferenceContext

    hidden = torch.randn(9, 1, 32, generator=torch.Generator().manual_seed(1))
    cache = StaticInferenceContext(1, 9)
    with torch.no_grad():
        model.next_logits(hidden[:5], cache)
        for end in range(6, 10):
            step = model.next_logits(hidden[end - 1 : end], cache)
            assert torch.allclose(step, model.next_logits(hidden[:end]), atol=1e-5)
            assert not torch.allclose(step, model.next_logits(hidden[:end].flip(0)), atol=1e-3)


def test_encoders_run_once_and_nothing_is_kept(
    asked: Asked,
    run: AskedRun,
    model: UniMoEModel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[int] = []
    encode = Encoder.encode
    monkeypatch.setattr(Encoder, "encode", lambda self, m: calls.append(len(m)) or encode(self, m))
    monkeypatch.setattr(prompt, "decode_apart", decode_here)
    files = [Attachment("image", "x", _unseen_picture()) for _ in range(2)]
    before = sorted((asked.folder / "cache").rglob("*"))
    for cached in (True, False):
        (answer,) = answers_of(
            run, model, [make_prompt(run, "<image> <image> ?", files, 6)], cached=cached
        )
        assert answer["tokens"]
    assert calls == [1, 1]  # the same picture twice, in each of two answers
    assert sorted((asked.folder / "cache").rglob("*")) == before


def test_a_seed_draws_the_same_and_another_does_not(
    run: AskedRun, model: UniMoEModel, asked: Asked
) -> None:
    def drawn(seed: int, top_p: float = 1.0) -> list[list[int]]:
        sampling = Sampling(temperature=3.0, top_p=top_p, seed=seed)
        return [each["tokens"] for each in answers_of(run, model, asked.prompts[:6], sampling)]

    first = drawn(1)
    torch.rand(3)  # another generator's business
    assert drawn(1) == first
    assert drawn(2) != first
    greedy = [each["tokens"] for each in answers_of(run, model, asked.prompts[:6])]
    assert drawn(1, top_p=1e-9) == greedy != first


def test_pieces_are_the_text(alone: list[dict[str, Any]]) -> None:
    """One comes after every token, so that an answer without text can be left too."""
    for answer in alone:
        assert "".join(answer["pieces"]) == answer["text"]
        assert len(answer["pieces"]) - len(answer["tokens"]) in (0, 1)


def test_shares_are_of_the_layers_with_experts(alone: list[dict[str, Any]]) -> None:
    for answer in alone:
        for shares in (answer["question_experts"], answer["answer_experts"]):
            assert list(shares) == ["0"]
            assert len(shares["0"]) == 4
            assert sum(shares["0"]) == pytest.approx(1, abs=1e-5)


def test_the_end_token_is_no_part_of_the_answers_shares(
    run: AskedRun, model: UniMoEModel, asked: Asked, alone: list[dict[str, Any]]
) -> None:
    cut = [
        replace(prompt, most=len(answer["tokens"]))
        for prompt, answer in zip(asked.prompts, alone, strict=True)
    ]
    for ended, answer in zip(alone, answers_of(run, model, cut), strict=True):
        assert (ended["ended"], answer["ended"]) == ("end", "length")
        assert answer["answer_experts"] == ended["answer_experts"]


def test_checkpoints_are_chosen(world: World, tmp_path: Path, run: AskedRun) -> None:
    run_folder = world.folder / "runs/stage3"
    assert open_run(run_folder, "step-2").state.step == 2
    assert open_run(run_folder).state.step == 4
    copy = tmp_path / "copy"
    shutil.copytree(run_folder, copy)
    CheckpointFolder(copy / "checkpoints", keep=1).mark_best(2)
    # As a run may have been logged before; it does not matter to what is asked.
    settings = OmegaConf.load(copy / "config.yaml")
    settings.logging = {"wandb": "disabled"}
    OmegaConf.save(settings, copy / "config.yaml")
    assert open_run(copy, "best").state.step == 2
    state = copy / "checkpoints/step-00000004/state.json"
    state.write_text(state.read_text().replace(run.sources.hashes["expert 1"], "0" * 64))
    with pytest.raises(UserError, match="was trained with another .* than there is now"):
        open_run(copy)


def test_the_command_in_two_processes(asked: Asked) -> None:
    """Only one speaks."""
    first, second = asked.printed
    answer = json.loads(first)
    assert answer["question"] == "<image>\nWhich colour?"
    assert answer["tokens"]
    assert answer["step"] == 60
    assert second == ""


def test_a_step_that_fails_ends_all_processes(asked: Asked) -> None:
    """The others wait for tokens that never come, and hear no word any more."""
    command = [sys.executable, "-m", "tests.generation.failing", str(asked.run), "What?"]
    done = subprocess.run(
        [*command, "--processes", "2"], cwd=REPOSITORY, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("Traceback") == 1
    assert done.stderr.endswith("ValueError: the second step fails\n")


def _unseen_picture() -> bytes:
    from tests.media import picture

    return picture(seed=77).data
