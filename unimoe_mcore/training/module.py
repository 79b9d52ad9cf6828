"""The train module: owns model, optimizer and parallel state; the loop knows none of them."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor

from unimoe_mcore.checkpoints.loading import begin_with, load_sources
from unimoe_mcore.checkpoints.sources import Sources
from unimoe_mcore.checkpoints.starting import Start
from unimoe_mcore.config.errors import UserError
from unimoe_mcore.config.recipe import Recipe
from unimoe_mcore.config.stage import stands_for
from unimoe_mcore.model.build import build_model
from unimoe_mcore.model.parts import train_only
from unimoe_mcore.model.towers.tower import Tower
from unimoe_mcore.model.unimoe import UniMoEModel
from unimoe_mcore.runtime.precision import DTYPES
from unimoe_mcore.training.gradients import finalise_gradients
from unimoe_mcore.training.inventory import take_inventory
from unimoe_mcore.training.meter import Meter
from unimoe_mcore.training.optimizer import build_optimizer
from unimoe_mcore.training.routers import Routers


class TrainModule:
    """Model chunks of this rank, wrapped for training, and their optimizer.

    Attributes:
        chunks: bare model chunks (one, or one per virtual pipeline stage).
        inventory: every parameter of the whole model, and whether it trains.
        began_with: tensors taken from ``stage.init_from`` by part.
        routers: of the chunks.
        meter: measures its steps.
    """

    def __init__(
        self,
        recipe: Recipe,
        groups: ProcessGroupCollection,
        markers: dict[str, int],
        kernels: dict[str, Any],
        sources: Sources,
        precision: str,
        start: Start | None = None,
    ) -> None:
        self.recipe = recipe
        self.groups = groups
        dtype = DTYPES[precision]
        virtual = recipe.parallel.virtual_pipeline
        stages = [None] if virtual == 1 else list(range(virtual))
        self.chunks: list[UniMoEModel] = [
            build_model(recipe, groups, markers, dtype, kernels, stage) for stage in stages
        ]
        for chunk in self.chunks:
            load_sources(chunk, sources, recipe)
            train_only(chunk, recipe.stage)
        self.inventory = take_inventory(self.chunks)
        self._check_all_train(recipe.stage.train)
        self.began_with = begin_with(self.chunks, start) if start is not None else {}
        self.routers = Routers(recipe, self.chunks)
        self.config = self.chunks[0].config
        self.wrapped = [self._wrap(chunk, first=i == 0) for i, chunk in enumerate(self.chunks)]
        self.optimizer = build_optimizer(recipe, self.wrapped, dtype)
        weakref.finalize(self, _let_go, self.wrapped, self.optimizer).atexit = False
        self.config.finalize_model_grads_func = partial(
            finalise_gradients, expert_tensor_group=groups.expt_tp
        )
        self.config.grad_scale_func = self.optimizer.scale_loss
        # Towers are on the first pipeline stage, the same on every tensor rank.
        self.meter = Meter(recipe, self.towers(), groups.tp.rank() == groups.pp.rank() == 0)

    def _check_all_train(self, parts: Sequence[str]) -> None:
        """Refuse a part of ``stage.train`` that no rank has.

        Raises:
            UserError: naming the part and those that there are.
        """
        found = {entry.part for entry in self.inventory if entry.trained}
        absent = [name for name in parts if not any(stands_for(name, part) for part in found)]
        if absent:
            raise UserError(f"stage.train names {', '.join(absent)}, which this model has not.")

    def _wrap(self, chunk: UniMoEModel, first: bool) -> DistributedDataParallel:
        reduction = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            # By the norm instead (unimoe_mcore.training.optimizer), in no pass of its own.
            check_for_nan_in_grad=False,
            use_distributed_optimizer=self.recipe.parallel.distributed_optimizer,
        )
        inner = Float16Module(self.config, chunk) if self.config.bf16 else chunk
        return DistributedDataParallel(self.config, reduction, inner, disable_bucketing=not first)

    @property
    def answers(self) -> bool:
        """Whether this rank speaks for its data-parallel rank (last stage, first tensor rank)."""
        return self.groups.tp.rank() == 0 and self.groups.pp.rank() == self.groups.pp.size() - 1

    @property
    def data_rank(self) -> int:
        """This rank's number among the data-parallel ranks."""
        return int(self.groups.dp.rank())

    @property
    def data_ranks(self) -> int:
        """Number of data-parallel ranks."""
        return int(self.groups.dp.size())

    def feature_folders(self) -> dict[str, Path | None]:
        """Folders of cached features by modality, of the towers on this rank.

        None where the encoder trains: its media must be decoded every time.
        """
        return {m: tower.features.folder for tower in self.towers() for m in tower.modalities}

    def towers(self) -> list[Tower]:
        """The towers on this rank."""
        return [tower for chunk in self.chunks for tower in chunk.modality_submodules.values()]

    def begin_step(self) -> None:
        """Forget the gradients of the last step."""
        for chunk in self.wrapped:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

    def from_last_stage(self, value: Tensor) -> Tensor:
        """A tensor that the last pipeline stage knows, on all stages."""
        if self.groups.pp.size() > 1:
            last = dist.get_global_rank(self.groups.pp, self.groups.pp.size() - 1)
            dist.broadcast(value, last, group=self.groups.pp)
        return value


def _let_go(wrapped: Sequence[DistributedDataParallel], optimizer: Any) -> None:
    """Break the rings of wrapper, gradient accumulator, hook and wrapper.

    They go through autograd's C++ nodes, where Python's collector does not follow: without this a
    model that nothing uses any more stays in memory, with its process groups. The nodes are held
    by a dispatcher's last probabilities as well, and by the distributed optimizer's stretches.
    """
    for each in wrapped:
        each.grad_accs.clear()
        for module in each.modules():
            if isinstance(module, MoELayer):
                vars(module.token_dispatcher).pop("probs", None)
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        vars(part).clear()
