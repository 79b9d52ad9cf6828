"""Fill a stage's model from the runs that its recipe names."""

from __future__ import annotations

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from unimoe_mcore.checkpoints.pieces import sharded_tensors
from unimoe_mcore.checkpoints.sources import Sources
from unimoe_mcore.checkpoints.store import ShardReader
from unimoe_mcore.config.errors import UserError
from unimoe_mcore.config.recipe import Recipe
from unimoe_mcore.model.assembly import origin
from unimoe_mcore.model.initialise import initialise
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
