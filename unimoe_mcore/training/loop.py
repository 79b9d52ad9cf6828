"""The training loop. It knows steps and callbacks, and nothing of models or parallelism."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from data_pipeline.reading.collate import MicroBatch
from unimoe_mcore.config.trainer import TrainerConfig
from unimoe_mcore.training.callbacks import Callback, StepRecord
from unimoe_mcore.training.report import mean_losses
from unimoe_mcore.training.step import StepResult


def train(
    trainer: TrainerConfig,
    first: int,
    read_step: Callable[[int], Sequence[MicroBatch]],
    train_step: Callable[[Sequence[MicroBatch], int], StepResult],
    callbacks: Sequence[Callback],
) -> None:
    """Run the steps from ``first`` to ``trainer.steps``.

    Args:
        first: steps that are done already.
        read_step: this rank's micro-batches of a step.
        train_step: one optimizer step on them, given its number.
        callbacks: called in order after every step.
    """
    for callback in callbacks:
        callback.start(first)
    for step in range(first, trainer.steps):
        began = time.perf_counter()
        batches = read_step(step)
        read = time.perf_counter()
        result = train_step(batches, step)
        record = StepRecord(
            step=step + 1,
            losses=mean_losses(result.sums),
            grad_norm=result.grad_norm,
            lr=result.lr,
            lrs=result.lrs,
            label_tokens=result.label_tokens,
            tokens=result.tokens,
            samples=result.samples,
            microbatches=len(batches),
            seconds=time.perf_counter() - began,
            data_seconds=read - began,
            routing=result.routing,
            measured=result.measured,
        )
        for callback in callbacks:
            callback.step(record)
    for callback in callbacks:
        callback.end()
