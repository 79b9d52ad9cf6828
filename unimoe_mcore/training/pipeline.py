"""Micro-batches through the pipeline: Megatron's schedule for a layout."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from megatron.core.pipeline_parallel import get_forward_backward_func

from data_pipeline.reading.collate import MicroBatch

if TYPE_CHECKING:
    from unimoe_mcore.training.module import TrainModule


def run_schedule(
    module: TrainModule, batches: Sequence[MicroBatch], forward: Any, **options: Any
) -> list[Any]:
    """Megatron's schedule for this layout over all micro-batches.

    Args:
        forward: Megatron's forward step: ``(iterator, model) -> (output, loss function)``.
        options: of the schedule.

    Returns:
        What the loss function reported for every micro-batch; empty but on the last stage.
    """
    if len(module.wrapped) > 1:
        # Interleaved stages cannot tell each other the length of a row (a stage would wait for the
        # length of a message that the other sends only after this one's): all rows get the same.
        longest = max(batch.input_ids.shape[1] for batch in batches)
        batches = [batch.lengthened(longest) for batch in batches]
    iterators: list[Iterator[MicroBatch]] = [iter(batches) for _ in module.wrapped]
    reports: list[Any] = get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=iterators if len(iterators) > 1 else iterators[0],
        model=module.wrapped if len(module.wrapped) > 1 else module.wrapped[0],
        num_microbatches=len(batches),
        seq_length=batches[0].input_ids.shape[1],
        micro_batch_size=1,
        **options,
    )
    return reports
