"""Core attention over packed sequences in plain PyTorch, for machines without fused kernels."""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class PackedAttention(MegatronModule):
    """Causal attention that stays inside each packed sequence.

    The packed row is laid out as a padded batch of sequences, so that the quadratic part is one
    batched matrix product instead of a loop. Matrix products and softmax are written out: the
    backward pass of PyTorch's fused attention is slower on CPU at these lengths. The softmax is
    in fp32. Takes the place of Megatron's ``DotProductAttention``, which refuses packed input.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        **_: Any,
    ) -> None:
        super().__init__(config)
        self.scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            query: ``[tokens, heads, head]``; ``key`` and ``value`` may have fewer heads, each
                shared by a group of query heads.
            packed_seq_params: cumulative lengths of the sequences, in ``cu_seqlens_q``.

        Returns:
            ``[tokens, heads * head]``.

        Raises:
            ValueError: if the input is not packed.
        """
        if packed_seq_params is None:
            raise ValueError("PackedAttention needs packed_seq_params.")
        tokens, heads, head = query.shape
        place, causal = _layout(packed_seq_params, tokens)

        def padded(x: Tensor) -> Tensor:  # [tokens, h, head] -> [sequences, heads, longest, head]
            spread = x.new_zeros((causal.shape[0] * causal.shape[2], *x.shape[1:]))
            spread = spread.index_copy(0, place, x)
            spread = spread.view(causal.shape[0], causal.shape[2], *x.shape[1:]).transpose(1, 2)
            repeats = heads // x.shape[1]
            return spread.repeat_interleave(repeats, 1) if repeats > 1 else spread

        scale = self.scale or 1 / math.sqrt(head)
        scores = torch.matmul(padded(query) * scale, padded(key).transpose(-1, -2))
        weights = scores.float().masked_fill(~causal, float("-inf")).softmax(-1).to(value.dtype)
        mixed = torch.matmul(weights, padded(value)).transpose(1, 2)
        return mixed.reshape(-1, heads, head).index_select(0, place).reshape(tokens, heads * head)


def _layout(packed: PackedSeqParams, tokens: int) -> tuple[Tensor, Tensor]:
    """Where each token lies in the padded batch, and who may attend to whom.

    Returns:
        ``place`` ``[tokens]``, index into the flattened ``[sequences * longest]``;
        ``causal`` ``[sequences, 1, longest, longest]``.
    """
    ends = packed.cu_seqlens_q.long()
    lengths = ends[1:] - ends[:-1]
    longest = int(packed.max_seqlen_q)
    sequence = torch.repeat_interleave(torch.arange(len(lengths), device=ends.device), lengths)
    place = torch.arange(tokens, device=ends.device) - ends[sequence] + sequence * longest
    # Causality alone is enough: what lies behind a sequence's end is after all of its tokens.
    causal = torch.ones(longest, longest, dtype=torch.bool, device=ends.device).tril()
    return place, causal.expand(len(lengths), 1, longest, longest)
