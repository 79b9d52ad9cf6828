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
    and keys, and takes cosines and sines anew each time. Without: right, and slow where a pack
    holds many short sequences (``benchmarks/thd_rope.py``). The arithmetic per element is the
    loop's.
    """
    from megatron.core.models.common.embeddings import rope_utils

    loop, turns = rope_utils._apply_rotary_pos_emb_thd, _Turns()

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
        if rotary_interleaved or mla_rotary_interleaved or mscale != 1.0:
            each = _frequency_of_each(freqs, cu_seqlens, len(t))
            return rope_utils._apply_rotary_pos_emb_bshd(
                t.unsqueeze(1), each, rotary_interleaved, mla_rotary_interleaved, mscale
            ).squeeze(1)
        turned: torch.Tensor = _Rotation.apply(t, *turns.of(freqs, cu_seqlens, t))
        return turned

    rope_utils._apply_rotary_pos_emb_thd = rotate


def _frequency_of_each(freqs: torch.Tensor, bounds: torch.Tensor, tokens: int) -> torch.Tensor:
    """``freqs`` [positions, 1, 1, dim] at every token's place in its sequence, [tokens, 1, 1, dim].

    Args:
        bounds: cumulative lengths of the sequences.
    """
    if freqs.size(0) == tokens:  # one frequency per token already, or one sequence
        return freqs
    starts, lengths = bounds[:-1].long(), bounds.diff()
    position = torch.arange(tokens, device=freqs.device)
    position -= starts.repeat_interleave(lengths, output_size=tokens)
    return freqs[position]


class _Turns:
    """Cosine and sine of every token of a row: the same in all layers, so the last are kept."""

    def __init__(self) -> None:
        self._asked: tuple[Any, ...] = ()
        self._found: tuple[torch.Tensor, torch.Tensor] | None = None

    def of(
        self, freqs: torch.Tensor, bounds: torch.Tensor, like: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Both ``[tokens, 1, dim]`` in the number format of ``like`` ``[tokens, heads, head]``.

        The first half of the sine is negated: it takes the second half of a head to the first.
        """
        kept = self._asked
        same = kept and kept[0] is freqs and kept[1] is bounds
        if not (same and kept[2] == (len(like), like.dtype)) or self._found is None:
            each = _frequency_of_each(freqs, bounds, len(like)).squeeze(1)
            first, second = each.sin().chunk(2, -1)
            sine = torch.cat((-first, second), -1)
            self._found = each.cos().to(like.dtype), sine.to(like.dtype)
            self._asked = (freqs, bounds, (len(like), like.dtype))  # held: no other gets their id
        return self._found


class _Rotation(torch.autograd.Function):
    """Rotates halves of heads; backwards by the opposite angle, for which nothing else is kept."""

    @staticmethod
    def forward(
        ctx: Any, t: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(cosine, sine)
        return _turned(t, cosine, sine)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cosine, sine = ctx.saved_tensors
        return _turned(gradient, cosine, sine.roll(sine.shape[-1] // 2, -1)), None, None


def _turned(t: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """``t`` [tokens, heads, head] with its first ``dim`` places rotated.

    Args:
        cosine: ``[tokens, 1, dim]``.
        sine: the same; what each half is multiplied by on its way into the place of the other.
    """
    dim = cosine.shape[-1]
    turning = t[..., :dim]
    # Not addcmul: it rounds once less than the loop.
    turned = (turning * cosine).add_(turning.roll(dim // 2, -1).mul_(sine))
    return turned if dim == t.shape[-1] else torch.cat((turned, t[..., dim:]), -1)


def patch_weight_gradients() -> None:
    """Add weight gradients to their buffer inside the matrix product, without Apex.

    ``layers.py:1070`` refuses it where Apex's ``fused_weight_gradient_mlp_cuda`` is missing, though
    torch's matrix product can add to what is there. Without: ``RuntimeError: ColumnParallelLinear
    was called with gradient_accumulation_fusion set to True``; and with the setting off a copy of
    each gradient and another pass over it and its buffer. A model that is not wrapped for training
    has no buffers: there autograd keeps the gradients.
    """
    from megatron.core.tensor_parallel import layers

    if not (layers._grad_accum_fusion_available and torch.cuda.is_available()):
        layers.fused_weight_gradient_mlp_cuda = _WeightGradients
        layers._grad_accum_fusion_available = True
    linear = layers.linear_with_grad_accumulation_and_async_allreduce

    @functools.wraps(linear)
    def into_buffers_that_are_there(
        input: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        gradient_accumulation_fusion: bool,
        *arguments: Any,
        **keywords: Any,
    ) -> torch.Tensor:
        fused = gradient_accumulation_fusion and hasattr(weight, "main_grad")
        return linear(input, weight, bias, fused, *arguments, **keywords)

    layers.linear_with_grad_accumulation_and_async_allreduce = into_buffers_that_are_there


class _WeightGradients:
    """What Megatron calls of Apex's extension."""

    @staticmethod
    def wgrad_gemm_accum_fp32(
        inputs: torch.Tensor, gradient: torch.Tensor, total: torch.Tensor
    ) -> None:
        """``total`` [out, in] += ``gradient`` [tokens, out] transposed, times ``inputs``."""
        if inputs.dtype == total.dtype:
            total.addmm_(gradient.t(), inputs)
        else:
            total.add_(gradient.t() @ inputs)

    wgrad_gemm_accum_fp16 = wgrad_gemm_accum_fp32


def patch_multi_tensor() -> None:
    """Norm and scaling of all gradients at once.

    ``utils.py``'s stand-ins for Apex's kernels (``clip_grads.py:44``) read every norm back to the
    host and copy every gradient to scale it. Without: right, with a wait and a temporary for each
    parameter.
    """
    from megatron.core.optimizer import clip_grads

    if clip_grads.multi_tensor_applier is not getattr(clip_grads, "local_multi_tensor_applier", 0):
        return  # those of Transformer Engine or Apex

    def norm(_: int, __: Any, lists: Any, *___: Any) -> tuple[torch.Tensor, None]:
        norms = torch.stack(list(torch._foreach_norm(lists[0])))
        return torch.linalg.vector_norm(norms)[None], None

    def scale(_: int, __: Any, lists: Any, factor: float) -> None:
        torch._foreach_mul_(lists[0], factor)  # Megatron scales in place only: both lists are one

    clip_grads.l2_norm_impl, clip_grads.multi_tensor_scale_impl = norm, scale


def patch_chunk_order() -> None:
    """Leave tokens where they are that are in the experts' order already.

    ``token_dispatcher.py`` cuts them up and joins them again, before and after the experts, also
    where nothing changes its place: wherever experts are not divided. Without: right, with two
    copies of all tokens in every layer and two more in its backward pass.
    """
    from megatron.core.transformer.moe import token_dispatcher

    sort = token_dispatcher.sort_chunks_by_idxs

    @functools.wraps(sort)
    def sort_unless_sorted(
        input: torch.Tensor,
        split_sizes: torch.Tensor,
        sorted_idxs: torch.Tensor,
        probs: torch.Tensor | None = None,
        fused: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        # The order is on the host, but for the fused kernel.
        if not fused and sorted_idxs.tolist() == list(range(len(sorted_idxs))):
            return input, probs
        moved: tuple[torch.Tensor, torch.Tensor | None] = sort(
            input, split_sizes, sorted_idxs, probs, fused
        )
        return moved

    token_dispatcher.sort_chunks_by_idxs = sort_unless_sorted


def patch_gated_mlp() -> None:
    """The gate of an MLP without copies, and its expert's weight behind the last matrix.

    ``mlp.py:314`` adds an offset (of 0.0) to one half of what the first matrix puts out; autograd
    joins the gradients of both halves by a copy; and ``mlp.py:337`` multiplies the activations by
    the router's weight of each token, though the last matrix is linear, so that the weight may as
    well come behind it, where a token is several times narrower (2.7 times at 7B). Without: right,
    with about twice the passes over the widest tensors of the model. Where the activation is one
    compiled kernel it stays.
    """
    from megatron.core.transformer.mlp import MLP
    from megatron.core.typed_torch import apply_module

    inside = MLP.forward

    @functools.wraps(inside)
    def forward(
        self: Any, hidden_states: torch.Tensor, per_token_scale: Any = None, **keywords: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if not _plainly_gated(self.config):
            done: tuple[torch.Tensor, torch.Tensor | None] = inside(
                self, hidden_states, per_token_scale, **keywords
            )
            return done
        wide, _ = apply_module(self.linear_fc1)(hidden_states)
        output, _ = apply_module(self.linear_fc2)(_GatedSilu.apply(wide))
        if per_token_scale is not None:
            output = (output * per_token_scale.unsqueeze(-1)).to(output.dtype)
        return output, None

    MLP.forward = forward


def _plainly_gated(config: Any) -> bool:
    """Whether an MLP is SwiGLU as Llama has it, and not one kernel already."""
    fused = config.bias_activation_fusion or config.use_te_activation_func
    changed = config.activation_func_clamp_value is not None or config.glu_linear_offset
    gated = config.gated_linear_unit and config.activation_func is torch.nn.functional.silu
    return bool(gated and not (fused or changed or config.add_bias_linear))


class _GatedSilu(torch.autograd.Function):
    """SiLU of the first half times the second half (Shazeer 2020, arXiv 2002.05202)."""

    @staticmethod
    def forward(ctx: Any, wide: torch.Tensor) -> torch.Tensor:
        """``wide`` [..., 2 * ffn] -> ``[..., ffn]``."""
        gate, value = wide.chunk(2, -1)
        opened = torch.nn.functional.silu(gate)
        ctx.save_for_backward(wide, opened)
        return opened * value

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        wide, opened = ctx.saved_tensors
        gate, value = wide.chunk(2, -1)
        both = torch.empty_like(wide)
        of_gate, of_value = both.chunk(2, -1)
        torch.mul(gradient, opened, out=of_value)
        torch.ops.aten.silu_backward.grad_input(gradient * value, gate, grad_input=of_gate)
        return both


PATCHES: tuple[Callable[[], None], ...] = (
    patch_torch_norm,
    patch_hybrid_final_norm,
    patch_adam,
    patch_thd_rope,
    patch_weight_gradients,
    patch_multi_tensor,
    patch_chunk_order,
    patch_gated_mlp,
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
