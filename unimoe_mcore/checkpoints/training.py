"""Checkpoints of a run: what trains, its optimizer state, and the plan's position."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import (
    ShardedTensor,
    ShardedTensorFactory,
)
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from torch import Tensor

from unimoe_mcore.checkpoints.store import (
    ShardReader,
    sharded_tensors,
    write_shards,
    write_text,
)
from unimoe_mcore.config.errors import UserError
from unimoe_mcore.model.unimoe import UniMoEModel

STATE = "state.json"
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class RunState:
    """What a run needs, besides tensors, to go on where it stopped.

    Attributes:
        step: optimizer steps done.
        base: hash of the base that the trained parts stand on; empty for the base stage.
        plan: fingerprint of the data plan.
        datasets: names in the plan, for a message when it differs.
        recipe: fingerprint of everything in the recipe that decides the numbers.
    """

    step: int
    base: str
    plan: str
    datasets: list[str]
    recipe: str


def main_parameter(parameter: torch.nn.Parameter) -> Tensor:
    """The fp32 weight that the optimizer moves: a bf16 parameter's copy, or the parameter."""
    main: Tensor = getattr(parameter, "main_param", parameter)
    return main


def trained_tensors(chunks: Sequence[UniMoEModel]) -> Iterator[ShardedTensor]:
    """The trained parameters as sharded tensors with their fp32 values."""
    for sharded, parameter in _trained(chunks):
        yield from _built(sharded, main_parameter(parameter).data, "model")


def _trained(
    chunks: Sequence[UniMoEModel],
) -> Iterator[tuple[ShardedTensor | ShardedTensorFactory, torch.nn.Parameter]]:
    for chunk in chunks:
        state = chunk.sharded_state_dict()
        by_data = {id(s.data): s for s in state.values() if hasattr(s, "data")}
        for name, parameter in chunk.named_parameters():
            if not parameter.requires_grad:
                continue
            sharded = state.get(name) or by_data.get(id(parameter.data))
            if sharded is None:
                raise KeyError(f"{name} has no sharded state")
            yield sharded, parameter


def _built(
    sharded: ShardedTensor | ShardedTensorFactory, value: Tensor, prefix: str
) -> Iterator[ShardedTensor]:
    yield from sharded_tensors({"x": make_sharded_optimizer_tensor(sharded, value, prefix)})


def _inner_optimizers(optimizer: Any) -> list[Any]:
    """Megatron's chain (dense, experts) as the list of PyTorch optimizers in it."""
    return [o.optimizer for o in getattr(optimizer, "chained_optimizers", [optimizer])]


def _moments(optimizer: Any) -> dict[Tensor, dict[str, Tensor]]:
    """Adam's moments by main parameter; made (zero) where no step has been taken yet."""
    moments: dict[Tensor, dict[str, Tensor]] = {}
    for inner in _inner_optimizers(optimizer):
        if inner is None:
            continue
        for group in inner.param_groups:
            for parameter in group["params"]:
                state = inner.state[parameter]
                for name in _MOMENTS:
                    state.setdefault(name, torch.zeros_like(parameter, dtype=torch.float32))
                moments[parameter] = state
    return moments


def _all_tensors(chunks: Sequence[UniMoEModel], optimizer: Any) -> Iterator[ShardedTensor]:
    moments = _moments(optimizer)
    yield from trained_tensors(chunks)
    for sharded, parameter in _trained(chunks):
        state = moments[main_parameter(parameter)]
        for name in _MOMENTS:
            yield from _built(sharded, state[name], f"optimizer.{name}")


class CheckpointFolder:
    """The checkpoints of one run: ``step-00000100`` and so on, each whole or not there."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.keep = keep

    def latest(self) -> Path | None:
        """The newest finished checkpoint."""
        found = [p for p in self.folder.glob("step-*") if re.fullmatch(r"step-\d{8}", p.name)]
        return max(found, default=None, key=lambda p: p.name)

    def save(self, chunks: Sequence[UniMoEModel], optimizer: Any, state: RunState) -> Path:
        """Write a checkpoint; a collective over all ranks.

        It is written under another name and becomes visible by one rename after every rank's
        part is on disk, so that no kill leaves half of one.
        """
        rank = dist.get_rank()
        target = self.folder / f"step-{state.step:08d}"
        partial = self.folder / f".partial-{target.name}"
        if rank == 0:
            for left in self.folder.glob(".partial-*"):
                shutil.rmtree(left)
            partial.mkdir(parents=True)
        dist.barrier()
        write_shards(partial, _all_tensors(chunks, optimizer), rank)
        dist.barrier()
        if rank == 0:
            write_text(partial / STATE, json.dumps(asdict(state)))
            if target.exists():
                shutil.rmtree(target)
            partial.rename(target)
            self._forget_old()
        dist.barrier()
        return target

    def _forget_old(self) -> None:
        steps = sorted(p for p in self.folder.glob("step-*") if p.is_dir())
        for old in steps[: -self.keep]:
            shutil.rmtree(old)


def read_state(folder: Path) -> RunState:
    """The state file of a checkpoint.

    Raises:
        UserError: if it cannot be read.
    """
    try:
        return RunState(**json.loads((folder / STATE).read_text(encoding="utf8")))
    except (OSError, TypeError, ValueError) as error:
        raise UserError(f"The checkpoint {folder} cannot be read: {error}.") from error


def load_weights(folder: Path, chunks: Sequence[UniMoEModel]) -> None:
    """Fill the trained parameters of a model that has no optimizer (evaluation, generation)."""
    reader = ShardReader(folder)
    with torch.no_grad():
        for sharded, parameter in _trained(chunks):
            value = torch.empty_like(parameter.data, dtype=torch.float32)
            for tensor in _built(sharded, value, "model"):
                reader.fill(tensor)
            parameter.data.copy_(value)


def load_checkpoint(folder: Path, chunks: Sequence[UniMoEModel], optimizer: Any, step: int) -> None:
    """Fill trained parameters, their fp32 copies and the optimizer's moments.

    Any layout can read what any other wrote.

    Raises:
        UserError: if the checkpoint is damaged or lacks a tensor.
    """
    reader = ShardReader(folder)
    for tensor in _all_tensors(chunks, optimizer):
        reader.fill(tensor)
    with torch.no_grad():
        for _, parameter in _trained(chunks):
            parameter.data.copy_(main_parameter(parameter).data)
    for inner in _inner_optimizers(optimizer):
        for group in inner.param_groups if inner is not None else ():
            group["step"] = step
