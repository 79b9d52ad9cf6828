"""The train module: owns model, optimizer and parallel state; the loop knows none of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from megatron.core.transformer.module import Float16Module
from megatron.core.utils import unwrap_model
from torch import Tensor

from data_pipeline.reading.collate import GROUPS, MicroBatch
from unimoe_mcore.checkpoints.loading import load_sources
from unimoe_mcore.checkpoints.sources import Sources
from unimoe_mcore.config.errors import UserError
from unimoe_mcore.config.recipe import Recipe
from unimoe_mcore.config.trainer import TrainerConfig
from unimoe_mcore.model.build import build_model
from unimoe_mcore.model.parts import train_only
from unimoe_mcore.model.towers.tower import Tower
from unimoe_mcore.model.unimoe import UniMoEModel
from unimoe_mcore.runtime.devices import device
from unimoe_mcore.runtime.precision import DTYPES
from unimoe_mcore.training.report import grouped_sums


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did, the same on every rank.

    Attributes:
        sums: loss sum and label tokens per group of samples, ``[groups, 2]`` fp64.
        grad_norm: of all trained parameters before clipping.
        label_tokens: of the global batch.
        tokens: of the global batch, without padding.
        samples: of the global batch.
    """

    sums: Tensor
    grad_norm: float
    label_tokens: int
    tokens: int
    samples: int


@dataclass(frozen=True)
class Judgement:
    """Teacher-forced answers of one micro-batch.

    Attributes:
        losses: of every token with a label, 0 elsewhere, ``[tokens]`` fp32.
        correct: for every token with a label, whether the likeliest next token is the label,
            ``[tokens]``. Where all tokens of an answer are, greedy decoding gives that answer.
    """

    losses: Tensor
    correct: Tensor


class TrainModule:
    """Model chunks of this rank, wrapped for training, and their optimizer.

    Attributes:
        chunks: bare model chunks (one, or one per virtual pipeline stage).
        trained: trained parameters on this rank by part.
    """

    def __init__(
        self,
        recipe: Recipe,
        groups: ProcessGroupCollection,
        markers: dict[str, int],
        kernels: dict[str, Any],
        sources: Sources,
        precision: str,
    ) -> None:
        self.recipe = recipe
        self.groups = groups
        dtype = DTYPES[precision]
        virtual = recipe.parallel.virtual_pipeline
        stages = [None] if virtual == 1 else list(range(virtual))
        self.chunks: list[UniMoEModel] = [
            build_model(recipe, groups, markers, dtype, kernels, stage) for stage in stages
        ]
        self.trained: dict[str, int] = {}
        for chunk in self.chunks:
            load_sources(chunk, sources, recipe)
            for part, count in train_only(chunk, recipe.stage.train).items():
                self.trained[part] = self.trained.get(part, 0) + count
        self._check_all_train(recipe.stage.train)
        self.config = self.chunks[0].config
        self.wrapped = [self._wrap(chunk, first=i == 0) for i, chunk in enumerate(self.chunks)]
        self.optimizer = get_megatron_optimizer(
            optimizer_config(recipe.trainer, dtype), self.wrapped
        )
        self.config.finalize_model_grads_func = finalize_model_grads
        self.config.grad_scale_func = self.optimizer.scale_loss

    def _check_all_train(self, parts: Sequence[str]) -> None:
        """Refuse a part of ``stage.train`` that no rank has.

        Raises:
            UserError: naming the part and those that there are.
        """
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, self.trained)
        found = {part for trained in gathered for part in trained}
        found |= {"connectors"} if any(part.startswith("connector.") for part in found) else set()
        absent = [part for part in parts if part not in found]
        if absent:
            raise UserError(f"stage.train names {', '.join(absent)}, which this model has not.")

    def _wrap(self, chunk: UniMoEModel, first: bool) -> DistributedDataParallel:
        reduction = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            # The finite check: a bad gradient stops the run before it reaches any weight.
            check_for_nan_in_grad=True,
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

    def feature_folders(self) -> dict[str, Path]:
        """Folders of cached encoder features by modality, of the towers on this rank."""
        return {m: tower.features.folder for tower in self.towers() for m in tower.modalities}

    def towers(self) -> list[Tower]:
        """The towers on this rank."""
        return [tower for chunk in self.chunks for tower in chunk.modality_submodules.values()]

    def train_step(self, batches: Sequence[MicroBatch], lr: float) -> StepResult:
        """Count label tokens, forward and backward, finalise, clip, step.

        The loss is the sum over all label tokens of the global batch, divided by their number,
        however the samples were dealt.

        Args:
            batches: this rank's micro-batches; every rank has equally many.
            lr: learning rate of this step.
        """
        label_tokens, tokens, samples = self._global_counts(batches)
        for chunk in self.wrapped:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        sums = self._run(batches, forward_only=False)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
            # Megatron exempts biases and vectors by a multiplier that only its own scheduler reads.
            group["weight_decay"] = self.recipe.trainer.weight_decay * group.get("wd_mult", 1.0)
        _, grad_norm, _ = self.optimizer.step()
        return StepResult(sums, float(grad_norm or 0.0), label_tokens, tokens, samples)

    def _global_counts(self, batches: Sequence[MicroBatch]) -> tuple[int, int, int]:
        """Label tokens, tokens and samples of the global batch."""
        mine = [[b.label_tokens, b.tokens, len(b.samples)] for b in batches]
        counts = torch.tensor(mine, dtype=torch.int64, device=self._device).sum(0)
        dist.all_reduce(counts, group=self.groups.dp)
        label_tokens, tokens, samples = (int(n) for n in counts)
        if not label_tokens:
            raise RuntimeError("a step without a single label token has no loss")
        return label_tokens, tokens, samples

    @property
    def _device(self) -> torch.device:
        return next(self.chunks[0].parameters()).device

    def _run(self, batches: Sequence[MicroBatch], forward_only: bool) -> Tensor:
        """Megatron's schedule over all micro-batches; grouped sums over all ranks."""
        iterators: list[Iterator[MicroBatch]] = [iter(batches) for _ in self.wrapped]
        reports = get_forward_backward_func()(
            forward_step_func=_forward_step,
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self.wrapped if len(self.wrapped) > 1 else self.wrapped[0],
            num_microbatches=len(batches),
            seq_length=batches[0].input_ids.shape[1],
            micro_batch_size=1,
            forward_only=forward_only,
        )
        sums = torch.zeros(len(GROUPS), 2, dtype=torch.float64, device=self._device)
        for report in reports:
            sums += report["sums"]
        dist.all_reduce(sums, group=self.groups.dp)
        return self.from_last_stage(sums)

    def from_last_stage(self, value: Tensor) -> Tensor:
        """A tensor that the last pipeline stage knows, on all stages."""
        if self.groups.pp.size() > 1:
            last = dist.get_global_rank(self.groups.pp, self.groups.pp.size() - 1)
            dist.broadcast(value, last, group=self.groups.pp)
        return value

    @torch.no_grad()
    def judge(self, batches: Sequence[MicroBatch]) -> list[Judgement]:
        """Loss and correctness of every token of every micro-batch, on the last stage.

        Other pipeline stages get an empty list. Every rank has equally many micro-batches.
        """
        for chunk in self.wrapped:
            chunk.eval()
        return list(
            get_forward_backward_func()(
                forward_step_func=_judge_step,
                data_iterator=iter(batches),
                model=self.wrapped[0],
                num_microbatches=len(batches),
                seq_length=batches[0].input_ids.shape[1],
                micro_batch_size=1,
                forward_only=True,
                collect_non_loss_data=True,
            )
        )


def optimizer_config(trainer: TrainerConfig, dtype: torch.dtype) -> OptimizerConfig:
    """AdamW with fp32 main weights."""
    return OptimizerConfig(
        optimizer="adam",
        lr=trainer.lr,
        weight_decay=trainer.weight_decay,
        adam_beta1=trainer.betas[0],
        adam_beta2=trainer.betas[1],
        adam_eps=trainer.eps,
        clip_grad=trainer.clip,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=False,
    )


def _loss(batch: MicroBatch, losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    total = (losses.float() * batch.loss_mask).sum()
    count = batch.loss_mask.sum().int()
    return total, count, {"sums": grouped_sums(losses, batch)}


def _forward_step(iterator: Iterator[MicroBatch], model: Any) -> tuple[Tensor, Any]:
    batch = next(iterator).to(device())
    return model(batch), partial(_loss, batch)


def _judge_step(iterator: Iterator[MicroBatch], model: Any) -> tuple[Tensor, Any]:
    batch = next(iterator).to(device())
    places = unwrap_model(model).answer_places(batch)
    return model(batch, with_loss=False), partial(_judge, batch, places)


def _judge(
    batch: MicroBatch, places: Tensor, logits: Tensor, non_loss_data: bool = True
) -> Judgement:
    whole = gather_from_tensor_model_parallel_region(logits)[0].float()
    labels = batch.labels[0, places]
    losses = torch.nn.functional.cross_entropy(whole, labels, reduction="none")
    row = torch.zeros_like(batch.loss_mask[0])
    return Judgement(
        row.index_copy(0, places, losses),
        row.index_copy(0, places, (whole.argmax(-1) == labels).float()).bool(),
    )
