"""Fill a stage's model from the runs that its recipe names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from unimoe_mcore.checkpoints.pieces import pieces_of, sharded_tensors
from unimoe_mcore.checkpoints.sources import Sources
from unimoe_mcore.checkpoints.starting import Start
from unimoe_mcore.checkpoints.store import ShardReader
from unimoe_mcore.config.errors import UserError
from unimoe_mcore.config.recipe import Recipe
from unimoe_mcore.model.assembly import origin
from unimoe_mcore.model.initialise import initialise
from unimoe_mcore.model.parts import part_of
from unimoe_mcore.model.unimoe import UniMoEModel


def load_sources(model: UniMoEModel, sources: Sources, recipe: Recipe) -> None:
    """Fill every tensor of this rank's model chunk.

    Raises:
        UserError: if a source lacks a tensor or has it in another shape.
    """
    seed, language = recipe.trainer.seed, recipe.model.language
    tensors = sharded_tensors(model.sharded_state_dict())
    if sources.base is None:
        for tensor in tensors:
            initialise(tensor, seed, language)
        return
    base = ShardReader(sources.base_folder)
    connectors = {tower: ShardReader(folder) for tower, folder in sources.connectors.items()}
    folders = {folder for folder in sources.experts if folder is not None}
    experts = {folder: ShardReader(folder) for folder in folders}
    for tensor in tensors:
        source = origin(tensor.key)
        if source.kind == "base":
            base.fill(tensor)
        elif source.kind == "experts":
            folder = sources.experts[int(tensor.global_offset[0])]
            _fill_expert(tensor, base if folder is None else experts[folder], source.name)
        elif source.kind == "connector":
            if source.tower in connectors:
                connectors[source.tower].fill(tensor)
        else:
            initialise(tensor, seed, language)


def _fill_expert(tensor: ShardedTensor, reader: ShardReader, dense: str) -> None:
    """Fill one expert's slice ``[1, out, in]`` of the stack from a dense weight ``[out, in]``."""
    stored = reader.tensors.get(dense)
    if stored is None:
        raise UserError(f"{reader.folder} has no tensor {dense}: it gives no MLP for that block.")
    if stored.shape != tuple(tensor.global_shape[1:]):
        raise UserError(
            f"{dense} has shape {list(stored.shape)} in {reader.folder} but the recipe's experts "
            f"need {list(tensor.global_shape[1:])}."
        )
    value = reader.read(dense, tuple(tensor.global_offset[1:]), tuple(tensor.local_shape))
    assert tensor.data is not None
    with torch.no_grad():
        tensor.data.copy_(value)


def begin_with(chunks: Sequence[UniMoEModel], start: Start) -> dict[str, int]:
    """Fill the trained parameters that another run has; a collective over all ranks.

    Returns:
        Tensors taken by part, and under ``left out`` those that do not train here.

    Raises:
        UserError: if it is damaged, has nothing that trains here, a tensor in another shape, or
            only some tensors of a part.
    """
    reader = ShardReader(start.folder)
    taken: dict[str, set[str]] = {}
    lacking: dict[str, str] = {}
    for chunk in chunks:
        state = chunk.sharded_state_dict()
        for name, parameter in chunk.named_parameters():
            if not parameter.requires_grad:
                continue
            part = part_of(name)
            for piece in pieces_of(state[name], parameter.shape, "model", parameter.data):
                stored = start.prefix + piece.name.removeprefix("model.")
                if stored in reader.tensors:
                    reader.fill(replace(piece, name=stored))
                    taken.setdefault(part, set()).add(stored)
                else:
                    lacking[part] = stored
    gathered: list[tuple[dict[str, set[str]], dict[str, str]]] = [({}, {})] * dist.get_world_size()
    dist.all_gather_object(gathered, (taken, lacking))
    every: dict[str, set[str]] = {}
    for of_rank, _ in gathered:
        for part, names in of_rank.items():
            every.setdefault(part, set()).update(names)
    if not every:
        raise UserError(f"stage.init_from: {start.folder} has nothing that trains here.")
    for _, lacked in gathered:
        for part in sorted(set(lacked) & set(every)):
            raise UserError(
                f"stage.init_from: {start.folder} has some of the {part}, but not {lacked[part]}."
            )
    held = {name for name in reader.tensors if not name.startswith("optimizer.")}
    counts = {part: len(names) for part, names in sorted(every.items())}
    return {**counts, "left out": len(held.difference(*every.values()))}
