"""Checkpoints of a run: what trains, its optimizer state, and the plan's position."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
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

from unimoe_mcore.checkpoints.files import flush, write_text
from unimoe_mcore.checkpoints.store import ShardReader, sharded_tensors, write_shards
from unimoe_mcore.config.errors import UserError
from unimoe_mcore.model.router import STATE as STATE_BUFFERS
from unimoe_mcore.model.unimoe import UniMoEModel

STATE = "state.json"
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class RunState:
    """What a run needs, besides tensors, to go on where it stopped.

    Attributes:
        step: optimizer steps done.
        sources: what the run stands on (base, experts, connectors) -> hash.
        plan: position in the data plan (``PlanState.to_json``).
        precision: number format of the run.
    """

    step: int
    sources: dict[str, str]
    plan: dict[str, Any]
    precision: str


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
        for name, parameter in chunk.named_parameters():
            if not parameter.requires_grad:
                continue
            yield state[name], parameter


def _remembered(chunks: Sequence[UniMoEModel]) -> Iterator[ShardedTensor]:
    """What routers remember of earlier steps, under the prefix ``state``."""
    for chunk in chunks:
        for name, sharded in chunk.sharded_state_dict().items():
            if name.endswith(STATE_BUFFERS):
                yield replace(sharded, key=f"state.{sharded.key}")


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
    yield from _remembered(chunks)
    for sharded, parameter in _trained(chunks):
        state = moments[main_parameter(parameter)]
        for name in _MOMENTS:
            yield from _built(sharded, state[name], f"optimizer.{name}")


class CheckpointFolder:
    """The checkpoints of one run: ``step-00000100`` and so on, each whole or not there."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.keep = keep

    def finished(self) -> list[Path]:
        """The finished checkpoints, newest first."""
        found = [p for p in self.folder.glob("step-*") if re.fullmatch(r"step-\d{8}", p.name)]
        return sorted(found, key=lambda p: p.name, reverse=True)

    def newest_whole(self, tell: Callable[[Path, str], None]) -> Path | None:
        """The newest checkpoint whose files have their checksums; None if there is none at all.

        Args:
            tell: called with every damaged one and what is wrong with it.

        Raises:
            UserError: if there are checkpoints, but all are damaged.
        """
        found = self.finished()
        for folder in found:
            try:
                read_state(folder)
                ShardReader(folder, verify=True)
            except UserError as error:
                tell(folder, str(error))
            else:
                return folder
        if found:
            raise UserError(f"All checkpoints in {self.folder} are damaged: delete it to restart.")
        return None

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
            flush(self.folder)
            self._forget_old()
        dist.barrier()
        return target

    def _forget_old(self) -> None:
        for old in self.finished()[self.keep :]:
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


def load_checkpoint(folder: Path, chunks: Sequence[UniMoEModel], optimizer: Any, step: int) -> None:
    """Fill trained parameters, their fp32 copies and the optimizer's moments.

    Any layout can read what any other wrote. The files have been verified (``newest_whole``).

    Raises:
        UserError: if the checkpoint lacks a tensor.
    """
    reader = ShardReader(folder, verify=False)
    for tensor in _all_tensors(chunks, optimizer):
        reader.fill(tensor)
    with torch.no_grad():
        for _, parameter in _trained(chunks):
            parameter.data.copy_(main_parameter(parameter).data)
    for inner in _inner_optimizers(optimizer):
        for group in inner.param_groups if inner is not None else ():
            group["step"] = step
