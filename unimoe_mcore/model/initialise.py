"""Initial values by name: the same numbers for the same tensor in every layout."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor

from unimoe_mcore.model.lora import lora_initial


def name_seed(seed: int, name: str) -> int:
    """A generator's seed from the run's seed and a tensor's name."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "little") >> 1


@contextmanager
def seeded_by_name(seed: int, name: str) -> Iterator[None]:
    """Build a module whose own initialisation depends on seed and name only."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(name_seed(seed, name))
        yield


def initial_value(name: str, shape: tuple[int, ...], seed: int, std: float) -> Tensor:
    """Whole initial value (fp32) of a tensor that a stage adds: router or LoRA.

    The router is N(0, std), as in the official model.
    """
    generator = torch.Generator().manual_seed(name_seed(seed, name))
    if ".lora_" in name:
        return lora_initial(name, shape, generator)
    return torch.randn(shape, generator=generator) * std


def initialise(tensor: ShardedTensor, seed: int, std: float) -> None:
    """Fill this rank's part of a tensor that the stage adds."""
    assert tensor.data is not None
    whole = initial_value(tensor.key, tuple(tensor.global_shape), seed, std)
    with torch.no_grad():
        tensor.data.copy_(whole[tensor.global_slice()])
