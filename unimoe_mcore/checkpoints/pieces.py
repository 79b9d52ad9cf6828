"""What a rank holds of a tensor, as far as files are concerned.

Megatron's ``sharded_state_dict`` cuts tensors into blocks: the same rows and columns on every
data-parallel rank. Its distributed optimizer cuts finer: it lays all parameters of a rank one
behind another in a flat buffer and gives every data-parallel rank a stretch of that, which begins
and ends anywhere inside a block. A piece is both: a block, and a stretch of its elements.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedTensor,
    ShardedTensorFactory,
    apply_factories,
    is_main_replica,
)
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from torch import Tensor


@dataclass(frozen=True)
class Piece:
    """A stretch of a block of a tensor.

    Attributes:
        name: of the tensor.
        global_shape: of the whole tensor.
        offset: of the block in it.
        shape: of the block, with as many axes.
        start: first element of the stretch, counted row by row inside the block.
        stop: behind its last element.
        data: the elements, of any shape; a view, so that writing into it writes into the model.
        writes: whether this rank is the one that writes it.
        step: optimizer steps that the values have seen, where that matters (moments).
    """

    name: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    start: int
    stop: int
    data: Tensor
    writes: bool
    step: int | None = None

    @property
    def whole(self) -> bool:
        """Whether the stretch is the block."""
        return self.stop - self.start == math.prod(self.shape)


def sharded_tensors(state: Mapping[str, Any]) -> Iterator[ShardedTensor]:
    """All sharded tensors of a sharded state dict, gated weights split into their halves.

    The tensors' data are views: writing into them writes into the model.
    """
    copied = dict(state)
    apply_factories(copied)
    for value in nested_values(copied):
        if isinstance(value, ShardedTensor):
            yield value


def piece_of(tensor: ShardedTensor) -> Piece:
    """A sharded tensor as a piece that is its whole block."""
    assert tensor.data is not None
    shape = _block_shape(tensor)
    return Piece(
        tensor.key,
        tuple(tensor.global_shape),
        tuple(tensor.global_offset),
        shape,
        0,
        math.prod(shape),
        tensor.data.detach(),
        is_main_replica(tensor.replica_id),
    )


def pieces_of(
    sharded: ShardedTensor | ShardedTensorFactory,
    shape: torch.Size,
    prefix: str,
    values: Tensor,
    start: int = 0,
    shared: bool = False,
    step: int | None = None,
) -> Iterator[Piece]:
    """The pieces of a stretch of a rank's local part of a tensor.

    Args:
        sharded: where the local part belongs, as the model describes it.
        shape: of the local part.
        prefix: goes in front of the tensor's name.
        values: elements ``start`` to ``start + values.numel()`` of the local part, row by row.
        start: first element.
        shared: whether the data-parallel replicas have the other stretches, rather than the same
            one. All of them then write.
        step: optimizer steps that the values have seen.

    Yields:
        A piece for every block; for a block outside of the stretch an empty one that nobody
        writes, so that the tensor's name is known.

    Raises:
        NotImplementedError: if a block is not one stretch of the local part.
    """
    flat = values.detach().view(-1)
    outline = torch.empty(shape, dtype=values.dtype, device="meta")
    described = make_sharded_optimizer_tensor(sharded, outline, prefix)
    for tensor in sharded_tensors({"it": described}):
        assert tensor.data is not None
        if not tensor.data.is_contiguous():
            raise NotImplementedError(f"{tensor.key} is split across its rows")
        block, low = _block_shape(tensor), int(tensor.data.storage_offset())
        first = min(max(start, low), low + tensor.data.numel())
        last = max(first, min(start + flat.numel(), low + tensor.data.numel()))
        replica = (*tensor.replica_id[:-1], 0) if shared else tensor.replica_id
        yield Piece(
            tensor.key,
            tuple(tensor.global_shape),
            tuple(tensor.global_offset),
            block,
            first - low,
            last - low,
            flat[first - start : last - start] if last > first else flat[:0],
            last > first and is_main_replica(replica),
            step,
        )


def _block_shape(tensor: ShardedTensor) -> tuple[int, ...]:
    """Shape of the block with the axes that Megatron leaves out (a stack of experts)."""
    return (1,) * tensor.prepend_axis_num + tuple(tensor.local_shape)
