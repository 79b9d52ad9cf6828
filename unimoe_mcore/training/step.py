"""One optimizer step, in the order in which it happens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from data_pipeline.reading.collate import GROUPS, MicroBatch
from unimoe_mcore.runtime.devices import device
from unimoe_mcore.training.meter import Measured
from unimoe_mcore.training.optimizer import set_rates
from unimoe_mcore.training.pipeline import run_schedule
from unimoe_mcore.training.report import grouped_sums
from unimoe_mcore.training.schedule import rates
from unimoe_mcore.training.warmup import hold_experts

if TYPE_CHECKING:
    from unimoe_mcore.training.module import TrainModule


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did, the same on every rank.

    Attributes:
        sums: loss sum and label tokens per group of samples, ``[groups, 2]`` fp64.
        grad_norm: of all trained parameters before clipping.
        label_tokens: of the global batch.
        tokens: of the global batch, without padding.
        samples: of the global batch.
        lr: learning rate.
        lrs: of the parts where it is another one.
        measured: what it cost.
        routing: ``router/...`` metrics, if this step records them.
    """

    sums: Tensor
    grad_norm: float
    label_tokens: int
    tokens: int
    samples: int
    lr: float
    lrs: dict[str, float]
    measured: Measured
    routing: dict[str, Any] = field(default_factory=dict)


def train_step(module: TrainModule, batches: Sequence[MicroBatch], step: int) -> StepResult:
    """Count label tokens, forward and backward, finalise, clip, check, step.

    The loss is the sum over all label tokens of the global batch, divided by their number,
    however the samples were dealt.

    Args:
        batches: this rank's micro-batches; every rank has equally many.
        step: its number, from 0: learning rates follow from it.
    """
    module.meter.begin()
    label_tokens, tokens, samples = _global_counts(module, batches)
    module.begin_step()
    module.routers.begin(step, batches, tokens, samples)
    sums = _forward_backward(module, batches, label_tokens)
    lrs = rates(step, module.recipe)
    set_rates(module.optimizer, lrs)
    hold_experts(module.recipe, module.wrapped, module.optimizer, step)
    with module.meter.optimizing():
        _, grad_norm, _ = module.optimizer.step()
    routing = module.routers.end()
    return StepResult(
        sums=sums,
        grad_norm=float(grad_norm or 0.0),
        label_tokens=label_tokens,
        tokens=tokens,
        samples=samples,
        lr=lrs[""].lr,
        lrs={part: rate.lr for part, rate in lrs.items() if rate.lr != lrs[""].lr},
        routing=routing,
        measured=module.meter.end(batches),
    )


def _global_counts(module: TrainModule, batches: Sequence[MicroBatch]) -> tuple[int, int, int]:
    """Label tokens, tokens and samples of the global batch."""
    mine = [[b.label_tokens, b.tokens, len(b.samples)] for b in batches]
    counts = torch.tensor(mine, dtype=torch.int64, device=device()).sum(0)
    dist.all_reduce(counts, group=module.groups.dp)
    label_tokens, tokens, samples = (int(n) for n in counts)
    if not label_tokens:
        raise RuntimeError("a step without a single label token has no loss")
    return label_tokens, tokens, samples


def _forward_backward(
    module: TrainModule, batches: Sequence[MicroBatch], label_tokens: int
) -> Tensor:
    """Megatron's schedule over all micro-batches; grouped sums over all ranks."""
    forward = partial(_forward, label_tokens)
    reports = run_schedule(module, batches, forward, forward_only=False)
    sums = torch.zeros(len(GROUPS), 2, dtype=torch.float64, device=device())
    for report in reports:
        sums += report["sums"]
    dist.all_reduce(sums, group=module.groups.dp)
    return module.from_last_stage(sums)


def _forward(label_tokens: int, iterator: Iterator[MicroBatch], model: Any) -> tuple[Tensor, Any]:
    batch = next(iterator).to(device())
    return model(batch), partial(_loss, batch, label_tokens)


def _loss(
    batch: MicroBatch, label_tokens: int, losses: Tensor
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """This micro-batch's share of the step's loss: no gradient need be divided afterwards."""
    total = (losses.float() * batch.loss_mask).sum() / label_tokens
    count = batch.loss_mask.sum().int()
    return total, count, {"sums": grouped_sums(losses, batch)}
