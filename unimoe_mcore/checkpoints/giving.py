"""What a finished stage gives to later ones, written as a sealed artefact."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from data_pipeline.conversation.tokenizer import TextTokenizer
from unimoe_mcore.checkpoints.artefact import TOKENIZER, Manifest, publish, seal
from unimoe_mcore.checkpoints.pieces import sharded_tensors
from unimoe_mcore.checkpoints.sources import Sources
from unimoe_mcore.checkpoints.store import write_shards
from unimoe_mcore.config.recipe import Recipe
from unimoe_mcore.config.stage import trains
from unimoe_mcore.model.assembly import is_mlp
from unimoe_mcore.model.lora import merge_lora
from unimoe_mcore.model.parts import part_of
from unimoe_mcore.model.unimoe import UniMoEModel


def give(
    folder: Path,
    recipe: Recipe,
    chunks: Sequence[UniMoEModel],
    sources: Sources,
    data: str,
    tokenizer: TextTokenizer,
) -> None:
    """Write the stage's artefact; a collective over all ranks, visible only when complete.

    A base gives its weights and tokenizer, stage 1 its connectors, stage 2 the MLPs with their
    adapters merged and the specialised connector, stage 3 and a dense stage all that they trained.
    An encoder that this run or one before it has trained goes with its connector.

    Args:
        sources: what the run took.
        data: digest of the data it was trained on.
    """
    rank = dist.get_rank()
    partial = folder.with_name(f".partial-{folder.name}")
    if rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        if recipe.stage.kind == "base":
            tokenizer.save(partial / TOKENIZER)
    dist.barrier()
    given = [tensor for chunk in chunks for tensor in _given(chunk, recipe)]
    write_shards(partial, iter(given), rank)
    dist.barrier()
    if rank == 0:
        towers = {kind: list(recipe.model.towers) for kind in ("align", "moe", "dense")}
        towers["expert"] = [recipe.stage.expert]
        facts = Manifest(
            kind=recipe.stage.kind,
            hash="",
            stands_on=sources.base.hash if sources.base else "",
            expert=recipe.stage.expert if recipe.stage.kind == "expert" else "",
            run=recipe.name,
            language=asdict(recipe.model.language),
            towers={
                name: asdict(recipe.model.towers[name])
                for name in towers.get(recipe.stage.kind, [])
            },
            sources=sources.hashes,
            data=data,
            lora=asdict(recipe.stage.lora) if _gives_adapters(recipe) else {},
            steps=recipe.trainer.steps,
        )
        seal(partial, facts)
        publish(partial, folder)
    dist.barrier()


def _given(chunk: UniMoEModel, recipe: Recipe) -> Iterator[ShardedTensor]:
    state = chunk.sharded_state_dict()
    merged = _merged(state, chunk) if _merges(recipe) else {}
    for name, entry in {**state, **merged}.items():
        # What is no tensor: the state that Transformer Engine's modules keep for 8-bit formats.
        if not isinstance(entry, ShardedTensor | ShardedTensorFactory):
            continue
        if merged and ".lora_" in name:
            continue
        if name in merged or _belongs(name, entry.key, recipe):
            yield from sharded_tensors({name: entry})
    for tower in chunk.modality_submodules.values():
        if _gives_connector(tower.name, recipe):
            yield from tower.passed_on()


def _merges(recipe: Recipe) -> bool:
    """Whether adapters are given as a part of the weights that they adapt."""
    return recipe.stage.kind == "expert" or recipe.stage.lora.merge


def _gives_adapters(recipe: Recipe) -> bool:
    return bool(recipe.stage.lora.targets) and not _merges(recipe)


def _belongs(name: str, key: str, recipe: Recipe) -> bool:
    kind = recipe.stage.kind
    if kind == "base":
        return key.startswith("language_model.")
    if kind == "align":
        return key.startswith(("connector.", "encoder."))
    if kind == "expert":
        own = tuple(f"{part}.{recipe.stage.expert}." for part in ("connector", "encoder"))
        return is_mlp(key) or key.startswith(own)
    if name.endswith(".previous_load"):
        return False  # of the last step: nothing for a later stage
    return trains(recipe.stage, part_of(name))


def _gives_connector(tower: str, recipe: Recipe) -> bool:
    kind = recipe.stage.kind
    if kind in ("moe", "dense"):
        return trains(recipe.stage, f"connector.{tower}")
    return kind == "align" or (kind == "expert" and tower == recipe.stage.expert)


def _merged(state: dict[str, Any], chunk: UniMoEModel) -> dict[str, Any]:
    """Every adapted weight's entry of the state, with its merged value."""
    values = {
        f"language_model.{layer}.weight": value
        for layer, value in merge_lora(chunk.language_model).items()
    }
    entries = {re.sub(r"^module\.", "", name): name for name in state}
    lacking = sorted(set(values) - set(entries))
    if lacking:
        raise KeyError(f"adapted layers without a sharded weight: {lacking}")
    return {entries[name]: replace(state[entries[name]], data=values[name]) for name in values}
