"""Initial values by name: the same numbers for the same tensor in every layout."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor

from unimoe_mcore.config.model import LanguageConfig
from unimoe_mcore.model.lora import lora_initial
from unimoe_mcore.model.router import STATE


def name_seed(seed: int, name: str) -> int:
    """A generator's seed from the run's seed and a tensor's name."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "little") >> 1


@contextmanager
def seeded_by_name(seed: int, name: str) -> Iterator[None]:
    """Build a module whose own initialisation depends on seed and name only."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(name_seed(seed, name))
        yield


def initial_value(name: str, shape: tuple[int, ...], seed: int, language: LanguageConfig) -> Tensor:
    """Whole initial value (fp32) of a language-model tensor, a router or an adapter.

    Norms are one; weights N(0, init_std), those that write into the residual stream
    N(0, init_std / sqrt(2 * blocks)) (Megatron's ``scaled_init_method_normal``, after GPT-2). What
    a router remembers of the steps before is zero.
    """
    if name.endswith("norm.weight"):
        return torch.ones(shape)
    if name.endswith(STATE):
        return torch.zeros(shape)
    generator = torch.Generator().manual_seed(name_seed(seed, name))
    if ".lora_" in name:
        return lora_initial(name, shape, generator)
    std = language.init_std
    if name.endswith((".linear_proj.weight", ".linear_fc2.weight")):
        std /= math.sqrt(2 * language.blocks)
    return torch.randn(shape, generator=generator) * std


def initialise(tensor: ShardedTensor, seed: int, language: LanguageConfig) -> None:
    """Fill this rank's part of a tensor that the stage makes anew."""
    assert tensor.data is not None
    whole = initial_value(tensor.key, tuple(tensor.global_shape), seed, language)
    with torch.no_grad():
        tensor.data.copy_(whole[tensor.global_slice()])
