"""Decisions that one rank takes for all: what lies on disk can look different from another node."""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed as dist

from data_pipeline.errors import DataError
from unimoe_mcore.config.errors import UserError


def decided_by_first_rank[T](decide: Callable[[], T]) -> T:
    """Call ``decide`` on rank 0 and hand its result, or its refusal, to every rank.

    A collective. Without it a rank that meets an error alone would leave the others waiting.

    Raises:
        UserError: on every rank, if rank 0 met a ``UserError`` or ``DataError``.
    """
    message: list[tuple[T | None, str]] = [(None, "")]
    if dist.get_rank() == 0:
        try:
            message = [(decide(), "")]
        except (UserError, DataError) as error:
            message = [(None, str(error))]
    dist.broadcast_object_list(message, src=0)
    result, refusal = message[0]
    if refusal:
        raise UserError(refusal)
    return result  # type: ignore[return-value]
