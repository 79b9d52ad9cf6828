"""Runs that were never trained: random weights, a checkpoint and what they would give."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import cache, reduce
from pathlib import Path
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from data_pipeline.conversation.tokenizer import TextTokenizer
from tests.exporting.texts import VOCABULARY, WORDS
from tests.training.cases_stages import composed
from unimoe_mcore.checkpoints.files import write_text
from unimoe_mcore.checkpoints.giving import give
from unimoe_mcore.checkpoints.loading import load_sources
from unimoe_mcore.checkpoints.pieces import pieces_of
from unimoe_mcore.checkpoints.shard_file import HostCopy
from unimoe_mcore.checkpoints.sources import find_sources
from unimoe_mcore.checkpoints.trained import trained
from unimoe_mcore.checkpoints.training import STATE, CheckpointFolder, RunState
from unimoe_mcore.config.composition import dump
from unimoe_mcore.config.recipe import Recipe
from unimoe_mcore.model.build import build_model
from unimoe_mcore.model.parts import train_only
from unimoe_mcore.model.unimoe import UniMoEModel
from unimoe_mcore.runtime.capabilities import detect, transformer_flags
from unimoe_mcore.runtime.run_directory import RunDirectory

STEP = 3


@dataclass(frozen=True)
class Made:
    """A run.

    Attributes:
        folder: ``runs/<name>``.
        model: as the run computes, fp32.
        tokenizer: of its base.
    """

    folder: Path
    model: UniMoEModel
    tokenizer: TextTokenizer

    @property
    def gives(self) -> Path:
        """What it gave."""
        return self.folder / "gives"


@cache
def recipe_of(world: Path, stage: str) -> Recipe:
    """A stage's recipe; composing one takes longer than anything else here."""
    changes = [f"model.language.vocabulary={VOCABULARY}", "parallel.expert=1"]
    if stage == "stage3":
        changes.append("stage.experts=[base,'${paths.runs}/stage2-image/gives',base]")
    return composed(str(world), stage, *changes)


@torch.no_grad()
def make(world: Path, stage: str, name: str = "", **changes: Any) -> Made:
    """A run of a stage whose trained parts, adapters' ``B`` among them, are random.

    Its logits differ by more than their rounding.

    Args:
        name: of the run; empty for the stage's.
        changes: setting of the recipe (``model__moe__top_k``) -> value.
    """
    recipe = deepcopy(recipe_of(world, stage))
    recipe.name = name or recipe.name
    for key, value in changes.items():
        *path, last = key.split("__")
        setattr(reduce(getattr, path, recipe), last, value)
    sources = find_sources(recipe)
    tokenizer = (
        TextTokenizer.train(WORDS, VOCABULARY)
        if sources.base is None
        else TextTokenizer.load(sources.base_folder / "tokenizer.json")
    )
    groups = ProcessGroupCollection.use_mpu_process_groups()
    flags = transformer_flags(detect())
    model = build_model(recipe, groups, dict(tokenizer.markers), torch.float32, flags)
    load_sources(model, sources, recipe)
    train_only(model, recipe.stage)
    torch.manual_seed(len(str(recipe)))
    for name, value in model.named_parameters():
        if value.requires_grad:
            values = torch.randn(value.shape)
            value.copy_(1 + 0.2 * values if name.endswith("norm.weight") else 0.25 * values)
    run = RunDirectory(Path(recipe.paths.runs) / recipe.name)
    run.path.mkdir(parents=True)
    write_text(run.config, dump(recipe))
    tokenizer.save(run.tokenizer)
    checkpoint = CheckpointFolder(run.checkpoints, keep=1).at(STEP)
    checkpoint.mkdir(parents=True)
    pieces = [
        piece
        for sharded, parameter in trained([model])
        for piece in pieces_of(sharded, parameter.shape, "model", parameter.data)
    ]
    HostCopy().take(pieces).write(checkpoint, 0)
    state = RunState(STEP, sources.hashes, {}, "fp32")
    write_text(checkpoint / STATE, json.dumps(asdict(state)))
    give(run.gives, recipe, [model], sources, "", tokenizer)
    return Made(run.path, model.eval(), tokenizer)
