"""From the gradients of this rank to those of the global batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from unimoe_mcore.model.lora import EXPERT_PARTIAL


def finalise_gradients(
    chunks: Sequence[DistributedDataParallel],
    num_tokens: Tensor | None = None,
    pg_collection: Any = None,
    force_all_reduce: bool | None = False,
    *,
    expert_tensor_group: dist.ProcessGroup,
) -> None:
    """Megatron's ``finalize_model_grads``, and what it does not know of: adapters on experts.

    Megatron sums over data-parallel ranks and sums what is replicated under sequence parallelism
    over tensor ranks. It would divide by the label tokens too, in one more pass over all gradients;
    here the loss is divided by them before (``unimoe_mcore.training.step``). It has no module that
    is replicated over the ranks that share an expert's matrices; an adapter's replicated half is
    one.

    Args:
        chunks: wrapped model chunks of this rank.
        num_tokens: label tokens of this rank's micro-batches; not used.
        pg_collection: process groups, or None for Megatron's own.
        force_all_reduce: passed on.
        expert_tensor_group: ranks that share each matrix of an expert.
    """
    finalize_model_grads(list(chunks), None, pg_collection, force_all_reduce)
    if expert_tensor_group.size() > 1:
        _sum_partial(chunks, expert_tensor_group)


def _sum_partial(chunks: Sequence[DistributedDataParallel], group: dist.ProcessGroup) -> None:
    """Sum the gradients that each rank of ``group`` has a part of, in one message."""
    partial = [
        parameter.main_grad
        for chunk in chunks
        for parameter in chunk.parameters()
        if parameter.requires_grad and getattr(parameter, EXPERT_PARTIAL, False)
    ]
    if not partial:
        return
    joined = _flatten_dense_tensors(partial)
    dist.all_reduce(joined, group=group)
    for gradient, total in zip(partial, _unflatten_dense_tensors(joined, partial), strict=True):
        gradient.copy_(total)
