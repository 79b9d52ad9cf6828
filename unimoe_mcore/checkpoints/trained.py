"""What a run trains, as pieces: parameters in fp32 and Adam's moments, named after parameters.

Moments and main parameters are wherever Megatron's optimizers keep them: shaped like the parameter,
or, in the distributed optimizer, as a stretch of it. Files know nothing of either.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor
from torch.nn import Parameter

from unimoe_mcore.checkpoints.pieces import Piece, pieces_of
from unimoe_mcore.checkpoints.store import ShardReader
from unimoe_mcore.config.errors import UserError
from unimoe_mcore.model.unimoe import UniMoEModel

MODEL = "model"
MOMENTS = ("exp_avg", "exp_avg_sq")

type Sharded = ShardedTensor | ShardedTensorFactory


@dataclass(frozen=True)
class Owned:
    """What this rank's optimizer keeps of a trained parameter.

    Attributes:
        main: fp32 values of elements ``start`` to ``start + main.numel()``, row by row.
        start: first element.
        shared: whether the data-parallel replicas keep the other elements.
        state: has Adam's moments, each shaped like ``main``.
        group: the optimizer's group that it is in; ``step`` counts its steps.
    """

    main: Tensor
    start: int
    shared: bool
    state: dict[str, Tensor]
    group: dict[str, Any]


def checkpoint_pieces(chunks: Sequence[UniMoEModel], optimizer: Any) -> Iterator[Piece]:
    """All that a checkpoint holds, as far as this rank has it."""
    owned = owned_by(optimizer)
    states = [chunk.sharded_state_dict() for chunk in chunks]  # once: the loop stands still for it
    for sharded, parameter in _trained(chunks, states):
        part = owned.get(parameter)
        if part is None:  # other data-parallel ranks have all of it: only its names
            nothing, held = parameter.new_empty(0, dtype=torch.float32), True
            start, values = 0, {MODEL: nothing, **{_moment(name): nothing for name in MOMENTS}}
            step = None
        else:
            start, held = part.start, part.shared
            values = {MODEL: part.main, **{_moment(n): part.state[n] for n in MOMENTS}}
            step = int(part.group.get("step", 0))
        for prefix, value in values.items():
            count = None if prefix == MODEL else step
            yield from pieces_of(sharded, parameter.shape, prefix, value, start, held, count)
    for chunk, state in zip(chunks, states, strict=True):
        yield from _buffers(chunk, state)


def trained(chunks: Sequence[UniMoEModel]) -> Iterator[tuple[Sharded, Parameter]]:
    """The trained parameters, and where each belongs."""
    return _trained(chunks, [chunk.sharded_state_dict() for chunk in chunks])


def _trained(
    chunks: Sequence[UniMoEModel], states: Sequence[dict[str, Any]]
) -> Iterator[tuple[Sharded, Parameter]]:
    for chunk, state in zip(chunks, states, strict=True):
        for name, parameter in chunk.named_parameters():
            if parameter.requires_grad:
                yield state[name], parameter


def _buffers(chunk: UniMoEModel, state: dict[str, Any]) -> Iterator[Piece]:
    """Values that training changes without a gradient (a router's bias per expert)."""
    for name, buffer in chunk.named_buffers():
        if name in state and buffer.is_floating_point():
            yield from pieces_of(state[name], buffer.shape, MODEL, buffer)


def _moment(name: str) -> str:
    return f"optimizer.{name}"


def owned_by(optimizer: Any) -> dict[Parameter, Owned]:
    """What this rank's optimizer keeps, by parameter of the model.

    Moments are made (zero) where no step has been taken yet.
    """
    owned: dict[Parameter, Owned] = {}
    for part in _parts(optimizer):
        inner = part.optimizer
        if inner is None:
            continue
        groups = {main: group for group in inner.param_groups for main in group["params"]}
        for parameter, main, start, shared in _mains(part, groups):
            state = inner.state[main]
            for name in MOMENTS:
                state.setdefault(name, torch.zeros_like(main, dtype=torch.float32))
            owned[parameter] = Owned(main, start, shared, state, groups[main])
    return owned


def _parts(optimizer: Any) -> Iterator[Any]:
    """Megatron's chain (dense, experts) as its links."""
    links = getattr(optimizer, "chained_optimizers", None)
    if links is None:
        yield optimizer
    else:
        for link in links:
            yield from _parts(link)


def _mains(part: Any, inner: Iterable[Parameter]) -> Iterator[tuple[Parameter, Tensor, int, bool]]:
    """Model parameter, main parameter, first element, whether replicas have the others."""
    if isinstance(part, DistributedOptimizer):
        for models, mains in (
            (part.model_fp32_groups, part.shard_fp32_groups),
            (part.model_float16_groups, part.shard_fp32_from_float16_groups),
        ):
            for parameters, shards in zip(models, mains, strict=True):
                for parameter, shard in zip(parameters, shards, strict=True):
                    stretch = part._get_model_param_range_map(parameter)["param"]
                    yield parameter, shard, stretch.start, True
    elif hasattr(part, "float16_groups"):  # 16-bit parameters have fp32 copies
        for parameters, mains in zip(
            part.float16_groups, part.fp32_from_float16_groups, strict=True
        ):
            for parameter, main in zip(parameters, mains, strict=True):
                yield parameter, main, 0, False
        for parameters in part.fp32_from_fp32_groups:
            for parameter in parameters:
                yield parameter, parameter, 0, False
    else:
        for parameter in inner:
            yield parameter, parameter, 0, False


def load_pieces(reader: ShardReader, chunks: Sequence[UniMoEModel], optimizer: Any) -> None:
    """Fill trained parameters, their fp32 copies, Adam's moments and its counts of steps.

    Any layout reads what any other wrote, and none talks to another rank: a rank of the
    distributed optimizer reads its own stretch, and the whole parameter besides.

    Raises:
        UserError: if a tensor is missing or has another shape, or parameters that share a count
            of steps here were saved after different numbers of steps.
    """
    states = [chunk.sharded_state_dict() for chunk in chunks]
    _fill_weights(reader, chunks, states)
    owned, parameters = owned_by(optimizer), list(_trained(chunks, states))
    for sharded, parameter in parameters:
        part = owned.get(parameter)
        if part is None:
            continue
        values = {MODEL: part.main, **{_moment(name): part.state[name] for name in MOMENTS}}
        for prefix, value in values.items():
            for piece in pieces_of(sharded, parameter.shape, prefix, value, part.start):
                reader.fill(piece)
    _take_up_steps(reader, parameters, owned)


def load_weights(reader: ShardReader, chunks: Sequence[UniMoEModel]) -> None:
    """Fill trained parameters, and what else of the model training changes; nothing of Adam's.

    Raises:
        UserError: if a tensor is missing or has another shape.
    """
    _fill_weights(reader, chunks, [chunk.sharded_state_dict() for chunk in chunks])


def _fill_weights(
    reader: ShardReader, chunks: Sequence[UniMoEModel], states: Sequence[dict[str, Any]]
) -> None:
    for sharded, parameter in _trained(chunks, states):
        for piece in pieces_of(sharded, parameter.shape, MODEL, parameter.data):
            reader.fill(piece)
    for chunk, state in zip(chunks, states, strict=True):
        for piece in _buffers(chunk, state):
            reader.fill(piece)


def _take_up_steps(
    reader: ShardReader,
    parameters: Iterable[tuple[Sharded, Parameter]],
    owned: dict[Parameter, Owned],
) -> None:
    counts: dict[int, tuple[int, str]] = {}
    for sharded, parameter in parameters:
        part = owned.get(parameter)
        if part is None:
            continue
        for piece in pieces_of(sharded, parameter.shape, _moment(MOMENTS[0]), part.main):
            step = reader.tensors[piece.name].step
            if step is None:
                raise UserError(f"{reader.folder} does not say how many steps {piece.name} took.")
            known, name = counts.setdefault(id(part.group), (step, piece.name))
            if known != step:
                raise UserError(
                    f"{reader.folder} has {name} after {known} steps and {piece.name} after "
                    f"{step}, but in this recipe they train with one learning rate: continue with "
                    f"the parts' settings that it was saved with."
                )
            part.group["step"] = step


def saved_sizes(chunks: Sequence[UniMoEModel]) -> dict[str, int]:
    """Bytes that a checkpoint takes for every tensor that this rank's chunks hold a part of.

    Of whole tensors, over all ranks; nothing is read or written, the model may be on meta.
    """
    sizes: dict[str, int] = {}
    for sharded, parameter in trained(chunks):
        outline = torch.empty(parameter.shape, dtype=torch.float32, device="meta")
        for prefix in (MODEL, *map(_moment, MOMENTS)):
            for piece in pieces_of(sharded, parameter.shape, prefix, outline):
                sizes[piece.name] = 4 * torch.Size(piece.global_shape).numel()
    return sizes
