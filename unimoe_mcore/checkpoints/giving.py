"""What a finished stage gives to later ones, written as a sealed artefact."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from data_pipeline.conversation.tokenizer import TextTokenizer
from unimoe_mcore.checkpoints.artefact import TOKENIZER, Manifest, publish, seal
from unimoe_mcore.checkpoints.pieces import sharded_tensors
from unimoe_mcore.checkpoints.sources import Sources
from unimoe_mcore.checkpoints.store import write_shards
from unimoe_mcore.config.recipe import Recipe
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
    adapters merged and the specialised connector, stage 3 all that it trained.

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
        towers = {"align": list(recipe.model.towers), "moe": list(recipe.model.towers)}
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
            steps=recipe.trainer.steps,
        )
        seal(partial, facts)
        publish(partial, folder)
    dist.barrier()


def _given(chunk: UniMoEModel, recipe: Recipe) -> Iterator[ShardedTensor]:
    state = chunk.sharded_state_dict()
    if recipe.stage.kind == "expert":
        state = _with_merged(state, chunk)
    for name, entry in state.items():
        if not hasattr(entry, "key") or (".lora_" in name and recipe.stage.kind == "expert"):
            continue
        if _belongs(name, entry.key, recipe):
            yield from sharded_tensors({name: entry})


def _belongs(name: str, key: str, recipe: Recipe) -> bool:
    kind = recipe.stage.kind
    if kind == "base":
        return key.startswith("language_model.")
    if kind == "align":
        return key.startswith("connector.")
    if kind == "expert":
        return is_mlp(key) or key.startswith(f"connector.{recipe.stage.expert}.")
    part = part_of(name)
    return part in recipe.stage.train or (
        part.startswith("connector.") and "connectors" in recipe.stage.train
    )


def _with_merged(state: dict[str, Any], chunk: UniMoEModel) -> dict[str, Any]:
    """The state with every adapted weight replaced by its merged value."""
    merged = {
        f"language_model.{layer}.weight": value
        for layer, value in merge_lora(chunk.language_model).items()
    }
    result = dict(state)
    for name in state:
        parameter = re.sub(r"^module\.", "", name)
        if parameter in merged:
            result[name] = replace(state[name], data=merged.pop(parameter))
    if merged:
        raise KeyError(f"adapted layers without a sharded weight: {sorted(merged)}")
    return result
