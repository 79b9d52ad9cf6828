"""Balancing losses that are sums over tokens, so that no dealing or accumulation changes them.

With ``E`` experts, ``s`` a token's scores for all experts (they sum to one), ``T`` tokens and ``S``
sequences of the global batch without padding, all losses have the form of Switch Transformers
(Fedus et al. 2021, eq. 4), ``E * sum_e f_e P_e`` with ``f`` the share of the load of every expert
and ``P`` the mean score; 1 at balance. As ``f`` has no gradient, each is a sum over tokens of
``sum_e pull_e s_e``. The forms differ in the tokens that ``f`` is counted over:

=================  ============================================================================
``official``       the first choices of the micro-batch; ``pull = E f / T``. GShard's form for
                   two experts a token (Lepikhin et al. 2020, algorithm 1), which is what the
                   official code computes
``sequence``       the choices of the token's own sequence of ``t`` tokens; ``pull = E f / (t S)``
                   (DeepSeek-V3 2024, eq. 17-20)
``global``         the choices of the whole step before this one; ``pull = E f / T``
``global_running`` the choices of this step's micro-batches so far, on all ranks
=================  ============================================================================

Qiu et al. 2025 (arXiv 2501.11873) show why the load should be counted over the global batch.
"""

from __future__ import annotations

import torch
from torch import Tensor


def shares(load: Tensor) -> Tensor:
    """Load over its sum, ``[..., experts]`` fp32; even where nothing was counted."""
    total = load.sum(-1, keepdim=True)
    even = torch.full_like(load, 1 / load.shape[-1], dtype=torch.float32)
    return torch.where(total > 0, load / total.clamp(min=1), even).float()


def first_choices(scores: Tensor, valid: Tensor) -> Tensor:
    """How many tokens like every expert best, ``[experts]`` int64.

    Args:
        scores: ``[tokens, experts]``.
        valid: False at padding, ``[tokens]``.
    """
    load = torch.zeros(scores.shape[1], dtype=torch.int64, device=scores.device)
    return load.index_add_(0, scores.argmax(-1), valid.long())


def sequence_load(chosen: Tensor, sample: Tensor, samples: int) -> Tensor:
    """Load of every expert from every sequence of a row, ``[samples, experts]`` int64.

    Args:
        chosen: which experts a token goes to, ``[tokens, experts]`` bool, all False at padding.
        sample: number of its sequence, ``[tokens]``.
        samples: sequences to count for; at least the largest number + 1.
    """
    load = torch.zeros(samples, chosen.shape[1], dtype=torch.int64, device=chosen.device)
    return load.index_add_(0, sample, chosen.long())


def pull(share: Tensor, tokens: int) -> Tensor:
    """``E f / T``: what scores are multiplied by, ``[experts]``."""
    return share * (share.shape[-1] / tokens)


def sequence_pull(load: Tensor, top_k: int, samples: int) -> Tensor:
    """``E f / (t S)`` for every sequence of a row, ``[samples in the row, experts]``.

    Args:
        load: of whole sequences, ``[samples in the row, experts]``.
        top_k: experts a token goes to.
        samples: of the global batch.
    """
    tokens = load.sum(-1, keepdim=True).clamp(min=1) / top_k
    return shares(load) * (load.shape[-1] / samples) / tokens


def moved_bias(bias: Tensor, load: Tensor, rate: float) -> Tensor:
    """The biases after a step: ``rate`` up for experts below the mean load, down for those above.

    Wang et al. 2024 (arXiv 2408.15664), algorithm 1.

    Args:
        bias: ``[experts]`` fp32.
        load: of the global batch, ``[experts]``.
    """
    return bias + rate * torch.sign(load.double().mean() - load.double()).to(bias.dtype)
