"""What is exported: a run, one of its checkpoints, or what a stage gave."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from data_pipeline.conversation.tokenizer import TextTokenizer
from unimoe_mcore.checkpoints.artefact import MANIFEST, TOKENIZER, Manifest, read_manifest
from unimoe_mcore.checkpoints.sources import Sources, find_sources
from unimoe_mcore.checkpoints.store import ShardReader
from unimoe_mcore.checkpoints.training import STATE, CheckpointFolder
from unimoe_mcore.config.composition import load_past
from unimoe_mcore.config.errors import UserError
from unimoe_mcore.config.model import LanguageConfig, LoRAConfig, MoEConfig, moe_blocks
from unimoe_mcore.config.recipe import Recipe
from unimoe_mcore.exporting.weights import Held, Weights, readers_of
from unimoe_mcore.generation.asked_run import open_run
from unimoe_mcore.runtime.precision import DTYPES
from unimoe_mcore.runtime.run_directory import RunDirectory


@dataclass(frozen=True)
class Subject:
    """A model that is exported.

    Attributes:
        source: what the user named.
        name: of its run.
        kind: of the stage that made it.
        step: optimizer steps that it was trained for.
        expert: the modality that it is specialised in, if its stage has one.
        language: shape of the language model.
        moe: where experts are and how tokens reach them.
        experts: their number in a block that has them; 0 for a dense model.
        shared: whether every token also passes an MLP of its own there.
        towers: tower -> ``TowerConfig`` as a dict.
        weights: its tensors.
        tokenizer: of its base; None where the base is not known.
    """

    source: Path
    name: str
    kind: str
    step: int
    expert: str
    language: LanguageConfig
    moe: MoEConfig
    experts: int
    shared: bool
    towers: Mapping[str, Any]
    weights: Weights
    tokenizer: TextTokenizer | None

    @property
    def sparse(self) -> list[int]:
        """Numbers of the blocks with experts."""
        return moe_blocks(self.moe.placement, self.language.blocks) if self.experts else []


def open_subject(source: Path, wanted: str = "newest") -> Subject:
    """Find a model and all that it stands on; files are compared with their checksums.

    Args:
        source: ``runs/<name>`` (its checkpoint, or what it gave if it has none), a checkpoint, or a
            folder that a stage gave.
        wanted: of a run: ``newest``, ``best`` or ``step-N``.

    Raises:
        UserError, DataError: it is none of these, is damaged, or what it stands on is missing or
            has changed.
    """
    if (source / MANIFEST).is_file():
        return _given(source)
    if (source / STATE).is_file():
        return _trained(source, source.resolve().parent.parent, source.resolve().name)
    run = RunDirectory(source)
    if run.config.is_file() and not CheckpointFolder(run.checkpoints, keep=1).finished():
        if (run.gives / MANIFEST).is_file() and wanted == "newest":
            return _given(run.gives)
    elif not run.config.is_file():
        raise UserError(
            f"{source} is no run, no checkpoint, and nothing that a stage gave: name such a folder."
        )
    return _trained(source, source, wanted)


def _trained(source: Path, folder: Path, wanted: str) -> Subject:
    """A run's checkpoint."""
    run = open_run(folder, wanted)
    own, dtype = Held(ShardReader(run.checkpoint), "model."), DTYPES[run.state.precision]
    weights = _weights(run.recipe, run.sources, own, dtype)
    return _subject(source, run.recipe, run.state.step, weights, run.tokenizer)


def _given(folder: Path) -> Subject:
    """What a stage gave."""
    manifest = read_manifest(folder, str(folder))
    config = folder.resolve().parent / "config.yaml"
    if manifest.kind == "base" or not config.is_file():
        return _alone(folder, manifest)
    recipe = load_past(config)
    sources = find_sources(recipe)
    for part in sorted({*manifest.sources, *sources.hashes}):
        if manifest.sources.get(part) != sources.hashes.get(part):
            raise UserError(
                f"{folder} was made with another {part} than there is now: bring the one back that "
                f"it stands on."
            )
    own = Held(ShardReader(folder))
    weights = _weights(recipe, sources, own, _dtype(own.reader))
    tokenizer = TextTokenizer.load(sources.base_folder / TOKENIZER)
    return _subject(folder, recipe, manifest.steps, weights, tokenizer)


def _alone(folder: Path, manifest: Manifest) -> Subject:
    """What a stage gave, without the recipe of that stage: a base is whole, other parts are not."""
    if manifest.kind not in ("base", "expert", "align"):
        raise UserError(
            f"{folder} holds what a {manifest.kind} stage trained, but not what that stands on: "
            f"name it in its run's folder, beside config.yaml."
        )
    reader, language = ShardReader(folder), LanguageConfig(**manifest.language)
    whole = manifest.kind == "base"
    weights = Weights(
        None if whole else Held(reader),
        reader if whole else None,
        [],
        {},
        _dtype(reader),
        _scale(LoRAConfig(**manifest.lora)),
        0,
        language,
    )
    return Subject(
        folder,
        manifest.run,
        manifest.kind,
        manifest.steps,
        manifest.expert,
        language,
        MoEConfig(),
        0,
        False,
        manifest.towers,
        weights,
        TextTokenizer.load(folder / TOKENIZER) if whole else None,
    )


def _weights(recipe: Recipe, sources: Sources, own: Held, dtype: torch.dtype) -> Weights:
    base = ShardReader(sources.base_folder) if sources.base is not None else None
    return Weights(
        own,
        base,
        readers_of(sources.experts, base) if base is not None else [],
        {tower: ShardReader(folder) for tower, folder in sources.connectors.items()},
        dtype,
        _scale(recipe.stage.lora),
        recipe.trainer.seed,
        recipe.model.language,
    )


def _subject(
    source: Path, recipe: Recipe, step: int, weights: Weights, tokenizer: TextTokenizer
) -> Subject:
    stage = recipe.stage
    mixture = stage.kind == "moe"
    return Subject(
        source,
        recipe.name,
        stage.kind,
        step,
        stage.expert if stage.kind == "expert" else "",
        recipe.model.language,
        recipe.model.moe,
        len(stage.experts) if mixture else 0,
        mixture and bool(stage.shared_expert),
        {} if stage.kind == "base" else {t: asdict(c) for t, c in recipe.model.towers.items()},
        weights,
        tokenizer,
    )


def _scale(lora: LoRAConfig) -> float:
    return lora.alpha / lora.rank


def _dtype(reader: ShardReader) -> torch.dtype:
    """The type that most of a folder's elements have."""
    sizes: dict[torch.dtype, int] = {}
    for stored in reader.tensors.values():
        sizes[stored.dtype] = sizes.get(stored.dtype, 0) + torch.Size(stored.shape).numel()
    return max(sizes, key=lambda dtype: sizes[dtype])
