"""What Megatron-Core 0.19.2 lacks without Transformer Engine, on any device.

Same rules as ``runtime.cpu``: one function per reason, with the line of Megatron that needs it.
``runtime.devices.prepare_device`` applies them on every machine, but for those whose reason is
gone: of the norms where layers are built of Transformer Engine's modules, of Adam where a fused one
is installed.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch

from unimoe_mcore.runtime.adam import FusedAdam

_installed = False


def patch_torch_norm() -> None:
    """P7. Let torch's norms run under sequence parallelism.

    ``torch_norm.py:53`` refuses (``AssertionError: sequence parallel not supported by torch
    LayerNorm``), though all that is needed is the mark ``sequence_parallel`` on the parameters, by
    which ``finalize_model_grads`` sums their gradients over the tensor-parallel ranks.
    """
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    original = WrappedTorchNorm.__new__

    def new(cls: type, config: Any, *arguments: Any, **keywords: Any) -> torch.nn.Module:
        apart = copy.copy(config)
        apart.sequence_parallel = False
        norm = original(cls, apart, *arguments, **keywords)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm

    WrappedTorchNorm.__new__ = new


def patch_hybrid_final_norm() -> None:
    """Give ``HybridModel`` a final norm.

    ``hybrid_block.py:215`` names Transformer Engine's ``TENorm`` instead of asking the layer spec.
    Without: ``ImportError: Transformer Engine is not installed``.
    """
    from megatron.core.models.hybrid import hybrid_block
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    hybrid_block.TENorm = WrappedTorchNorm


def patch_adam() -> None:
    """P9. An Adam that can be saved and loaded.

    Megatron's fallback on ``torch.optim.AdamW`` cannot: ``distrib_optimizer.py:839`` asserts that
    there is a step before the first one, ``:1032`` shares one ``step`` tensor between all
    parameters, ``:1223`` looks up ``step`` among tensors that do not have it. Without:
    ``AssertionError`` as soon as a checkpoint is loaded or saved before the first step.
    """
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    optimizer.Adam = distrib_optimizer.Adam = FusedAdam
    optimizer.USING_PYTORCH_OPTIMIZER = False
    distrib_optimizer.HAVE_APEX_OR_TE = True
    distrib_optimizer.USING_APEX_OPTIMIZER = True  # "the step is in the parameter group"
    distrib_optimizer.USING_TE_OPTIMIZER = False


def patch_thd_rope() -> None:
    """Rotate a packed batch in one go instead of sequence by sequence (with any layers).

    ``rope_utils.py:261`` loops over the sequences in Python, in every attention layer for queries
    and keys. Without: right, and slow where a pack holds many short sequences
    (``benchmarks/thd_rope.py``). The arithmetic per element is the loop's.
    """
    from megatron.core.models.common.embeddings import rope_utils

    loop = rope_utils._apply_rotary_pos_emb_thd

    @functools.wraps(loop)
    def rotate(
        t: torch.Tensor,
        cu_seqlens: torch.Tensor,
        freqs: torch.Tensor,
        rotary_interleaved: bool = False,
        mla_rotary_interleaved: bool = False,
        mscale: float = 1.0,
        cp_group: Any = None,
        multi_latent_attention: bool | None = None,
    ) -> torch.Tensor:
        """``t`` [tokens, heads, dim], ``freqs`` [positions, 1, 1, rotary dim] -> like ``t``."""
        if cp_group is None or cp_group.size() > 1 or multi_latent_attention is not None:
            return loop(
                t, cu_seqlens, freqs, rotary_interleaved, mla_rotary_interleaved, mscale, cp_group,
                multi_latent_attention,
            )  # fmt: skip
        if freqs.size(0) != t.size(0):  # else there is one frequency per token already
            starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff()
            position = torch.arange(t.size(0), device=t.device)
            position -= starts.repeat_interleave(lengths, output_size=t.size(0))
            freqs = freqs[position]
        return rope_utils._apply_rotary_pos_emb_bshd(
            t.unsqueeze(1), freqs, rotary_interleaved, mla_rotary_interleaved, mscale
        ).squeeze(1)

    rope_utils._apply_rotary_pos_emb_thd = rotate


PATCHES: tuple[Callable[[], None], ...] = (
    patch_torch_norm,
    patch_hybrid_final_norm,
    patch_adam,
    patch_thd_rope,
)
"""All patches, in the order in which they are applied."""


def install(keep_norms: bool = False, keep_adam: bool = False) -> None:
    """Apply every patch, once; a second call does nothing.

    Args:
        keep_norms: leave the norms as they are (layers are built of Transformer Engine's modules).
        keep_adam: leave the optimizer as it is (a ``FusedAdam`` of Transformer Engine or Apex is
            there and usable).
    """
    global _installed
    if _installed:
        return
    norms = (patch_torch_norm, patch_hybrid_final_norm)
    for patch in PATCHES:
        if not (keep_norms and patch in norms) and not (keep_adam and patch is patch_adam):
            patch()
    _installed = True
