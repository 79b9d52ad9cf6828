from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import TransformerEngineBaseModule


class DotProductAttention(TransformerEngineBaseModule):
    """Causal attention within each sequence of a packed row, one sequence after another."""

    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: int,
        num_gqa_groups: int | None = None,
        attention_dropout: float = 0.0,
        attn_mask_type: str = "causal",
        sequence_parallel: bool = False,
        tp_size: int = 1,
        get_rng_state_tracker: Callable[[], Any] | None = None,
        tp_group: Any = None,
        layer_number: int | None = None,
        attention_type: str = "self",
        softmax_scale: float | None = None,
    ) -> None:
        super().__init__()
        assert attention_dropout == 0
        assert attn_mask_type == "causal"
        assert attention_type == "self"
        self.heads, self.head, self.groups = num_attention_heads, kv_channels, num_gqa_groups
        self.scale = softmax_scale

    def forward(
        self,
        query_layer: Tensor,
        key_layer: Tensor,
        value_layer: Tensor,
        attention_mask: Tensor | None = None,
        qkv_format: str | None = None,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_kv: Tensor | None = None,
        cu_seqlens_q_padded: Tensor | None = None,
        cu_seqlens_kv_padded: Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_kv: int | None = None,
        attn_mask_type: str | None = None,
        pad_between_seqs: bool | None = None,
    ) -> Tensor:
        """``[tokens, heads, head]`` (keys, values: ``[tokens, groups, head]``) to
        ``[tokens, heads * head]``; the lengths cover all tokens."""
        assert (qkv_format, attn_mask_type) == ("thd", "padding_causal")
        assert attention_mask is None
        assert cu_seqlens_q is not None
        assert cu_seqlens_kv is not None
        assert cu_seqlens_q.dtype == torch.int32
        assert torch.equal(cu_seqlens_q, cu_seqlens_kv)
        assert (cu_seqlens_q_padded, cu_seqlens_kv_padded) == (None, None)
        assert not pad_between_seqs
        assert query_layer.shape[1:] == (self.heads, self.head)
        assert key_layer.shape[1:] == value_layer.shape[1:] == (self.groups, self.head)
        lengths = cu_seqlens_q.diff().tolist()
        assert max_seqlen_q == max_seqlen_kv == max(lengths)
        assert sum(lengths) == len(query_layer)
        parts = zip(*(x.split(lengths) for x in (query_layer, key_layer, value_layer)), strict=True)
        mixed = [
            F.scaled_dot_product_attention(
                *(x.transpose(0, 1) for x in part),
                is_causal=True,
                scale=self.scale,
                enable_gqa=True,
            ).transpose(0, 1)
            for part in parts
        ]
        return torch.cat(mixed).flatten(1)
