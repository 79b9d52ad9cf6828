"""Runs inside the processes of ``run_distributed``: a run is trained and then asked."""

from __future__ import annotations

import contextlib
import io
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from data_pipeline.conversation.template import Rendered
from data_pipeline.importers.item import MediaFile
from data_pipeline.reading.collate import collate
from tests.generation.inline import decode_here
from tests.media import picture
from tests.training.cases_stages import composed, opened
from unimoe_mcore import generate
from unimoe_mcore.generation import prompt
from unimoe_mcore.generation.answering import Answer, Answerer, load_model
from unimoe_mcore.generation.asked_run import AskedRun, open_run
from unimoe_mcore.generation.lockstep import run_along
from unimoe_mcore.generation.prompt import Attachment, Prompt, make_prompt
from unimoe_mcore.generation.sampling import Sampling
from unimoe_mcore.model.unimoe import UniMoEModel
from unimoe_mcore.runtime import groups
from unimoe_mcore.training.judging import judge
from unimoe_mcore.training.stage import StageRun

GREEDY = Sampling()
MOST = 12
"""Tokens of an answer."""
LEARNS = (
    "name=asked",
    "stage.train=[router,experts,mlp,attention,embeddings,norms,connectors]",
    "stage.lora.targets=[]",
    "trainer.steps=60",
    "trainer.lr=1e-2",
    "trainer.checkpoint_every=60",
    "trainer.log_every=60",
    "trainer.evaluation.before=false",
)
"""A stage 3 in which everything trains, so that after a minute it has something to say."""
IN_BF16 = (
    *LEARNS[1:],
    "name=asked-bf16",
    "trainer.precision=bf16",
    "trainer.steps=2",
    "trainer.lr=1e-5",
)
"""The same, continued in another precision; its first weights are the other's."""


def prepared(run: Path, row: tuple[str, str, list[MediaFile]]) -> Prompt:
    """A question of the tiny world, from its files' bytes; decoded in this process."""
    question, _, media = row
    files = [Attachment(m.modality, f"file {i}", m.data) for i, m in enumerate(media)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prompt, "decode_apart", decode_here)
        return make_prompt(open_run(run), question, files, MOST)


def trained_and_asked(folder: str, prompts: str) -> dict[str, Any]:
    """Train ``runs/asked`` with its experts on two processes, evaluate it, and ask it so.

    Returns:
        of both precisions: the run's name, its answers, and whether the evaluation calls them
        exact; as ``printed`` what the command prints of the first, given to both processes.
    """
    questions: list[Prompt] = pickle.loads(Path(prompts).read_bytes())
    found: dict[str, Any] = {}
    for precision, settings in (("fp32", LEARNS), ("bf16", IN_BF16)):
        if precision == "bf16":
            settings = (*settings, f"stage.init_from={folder}/runs/asked")
        stage = opened(composed(folder, "stage3", *settings))
        assert stage.precision == precision
        stage.run()
        dist.barrier()
        groups.destroy(keep_world=True)
        name = stage.recipe.name
        answers = asked_together(Path(folder) / "runs" / name, questions)
        found[precision] = {
            "name": name,
            "answers": answers,
            "exact": exact(stage, questions, answers),
        }
        groups.destroy(keep_world=True)
    return {**found, "printed": printed(Path(folder))}


def printed(folder: Path) -> str:
    """What the command prints in this process; it leaves ``torch.distributed``."""
    file = folder / f"p{dist.get_rank()}.png"
    file.write_bytes(picture(seed=77).data)
    asked = [str(folder / "runs/asked"), "--image", str(file), "Which colour?", "--json"]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert generate.main(asked) == 0
    return said.getvalue()


def asked_together(run_folder: Path, questions: list[Prompt]) -> list[dict[str, Any]]:
    """What rank 0 answers while the others run along; the same on all."""
    run = open_run(run_folder, processes=dist.get_world_size())
    model = load_model(run, groups.initialise(run.recipe.parallel))
    found: list[Any] = [[]]
    if dist.get_rank() == 0:
        found = [answers_of(run, model, questions)]
    else:
        run_along(model, run.tokenizer.pad)
    dist.broadcast_object_list(found, 0)
    groups.destroy(keep_world=True)
    answers: list[dict[str, Any]] = found[0]
    return answers


def answers_of(
    run: AskedRun,
    model: UniMoEModel,
    questions: list[Prompt],
    sampling: Sampling = GREEDY,
    cached: bool = True,
) -> list[dict[str, Any]]:
    """Pieces and answer of every question; nothing can be asked afterwards."""
    answerer = Answerer(run, model)
    found = []
    for question in questions:
        *pieces, answer = answerer.answer(question, sampling, cached)
        assert isinstance(answer, Answer)
        found.append({**vars(answer), "pieces": pieces})
    answerer.end()
    return found


def exact(stage: StageRun, questions: list[Prompt], answers: list[dict[str, Any]]) -> list[bool]:
    """Whether the evaluation would call each answer exact if it were the right one."""
    groups.initialise(stage.recipe.parallel)
    batches = []
    for question, answer in zip(questions, answers, strict=True):
        said = [*answer["tokens"], stage.tokenizer.end]
        asked_for = question.sample.tokens.ids
        tokens = Rendered([*asked_for, *said], [False] * len(asked_for) + [True] * len(said))
        sample = replace(question.sample, tokens=tokens)
        batches.append(collate([sample], stage.tokenizer.pad, 1))
    judged = judge(stage.module, batches)
    return [
        bool(each.correct[batch.loss_mask[0].bool()].all())
        for each, batch in zip(judged, batches, strict=True)
    ]
