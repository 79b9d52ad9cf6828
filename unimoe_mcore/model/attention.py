"""Core attention over packed sequences by PyTorch's own fused kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from unimoe_mcore.runtime.precision import attention_dtype


class PackedAttention(MegatronModule):
    """Causal attention that stays inside each packed sequence, or one sequence after its cache.

    The packed row is laid out as a padded batch of sequences, so that PyTorch's fused attention
    takes all of them at once instead of a loop; the scores are never written to memory, and keys
    and values that a group of heads shares are not repeated. Takes the place of Megatron's
    ``DotProductAttention``, which refuses packed input.

    Input that is not packed is a batch of equally long sequences, as Megatron's inference contexts
    hand it over: keys and values of all tokens so far, queries of the new ones.
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
            query: ``[tokens, heads, head]``, or not packed ``[tokens, sequences, heads, head]``;
                ``key`` and ``value`` may have fewer heads, each shared by a group of query heads,
                and not packed more tokens.
            attn_mask_type: of input that is not packed: causal or none.
            packed_seq_params: cumulative lengths of the sequences, in ``cu_seqlens_q``; None for
                input that is not packed.

        Returns:
            ``[tokens, heads * head]``, or ``[tokens, sequences, heads * head]``.
        """
        if packed_seq_params is None:
            return self._unpacked(query, key, value, attn_mask_type == AttnMaskType.causal)
        row = _row_of(packed_seq_params, len(query))
        computes = attention_dtype(query.dtype)
        mixed = F.scaled_dot_product_attention(
            row.spread(query.to(computes)),
            row.spread(key.to(computes)),
            row.spread(value.to(computes)),
            # Enough: what lies behind a sequence's end is after all of its tokens.
            is_causal=True,
            scale=self.scale,
            enable_gqa=key.shape[1] != query.shape[1],
        )
        return row.joined(mixed).to(query.dtype)

    def _unpacked(self, query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Tensor:
        """Attend in sequences that are equally long.

        Raises:
            ValueError: several new tokens after a cache: none of them may see the next ones.
        """
        if len(query) > 1 and not (causal and len(query) == len(key)):
            raise ValueError("PackedAttention continues a sequence by one token at a time.")
        computes = attention_dtype(query.dtype)  # as packed, so that answers are the same
        mixed = F.scaled_dot_product_attention(
            query.to(computes).permute(1, 2, 0, 3),
            key.to(computes).permute(1, 2, 0, 3),
            value.to(computes).permute(1, 2, 0, 3),
            is_causal=len(query) > 1,
            scale=self.scale,
            enable_gqa=key.shape[2] != query.shape[2],
        )
        return mixed.permute(2, 0, 1, 3).flatten(2).to(query.dtype)


@dataclass(frozen=True)
class _Row:
    """How a packed row is laid out as a batch of sequences that are equally long.

    Attributes:
        sequences: their number.
        longest: tokens of the longest.
        place: of each token in ``[sequences * longest]``; None where all are as long as the
            longest, so that nothing need be moved.
    """

    sequences: int
    longest: int
    place: Tensor | None

    def spread(self, x: Tensor) -> Tensor:
        """``[tokens, heads, head]`` to ``[sequences, heads, longest, head]``."""
        if self.place is not None:
            spread = x.new_zeros((self.sequences * self.longest, *x.shape[1:]))
            x = spread.index_copy(0, self.place, x)
        return x.view(self.sequences, self.longest, *x.shape[1:]).transpose(1, 2)

    def joined(self, x: Tensor) -> Tensor:
        """``[sequences, heads, longest, head]`` to ``[tokens, heads * head]``."""
        flat = x.transpose(1, 2).reshape(self.sequences * self.longest, -1)
        return flat if self.place is None else flat.index_select(0, self.place)


def _row_of(packed: PackedSeqParams, tokens: int) -> _Row:
    """The layout of a row; found once, and kept with what Megatron hands to all layers."""
    row: _Row | None = getattr(packed, "unimoe_row", None)
    if row is None:
        sequences, longest = len(packed.cu_seqlens_q) - 1, int(packed.max_seqlen_q)
        place = None
        if tokens != sequences * longest:
            place = _places(packed.cu_seqlens_q.long(), longest, tokens)
        row = _Row(sequences, longest, place)
        packed.unimoe_row = row
    return row


def _places(ends: Tensor, longest: int, tokens: int) -> Tensor:
    """Where each token lies in the flattened ``[sequences * longest]``, ``[tokens]``."""
    sequence = torch.arange(len(ends) - 1, device=ends.device)
    # Its size is told: otherwise the host waits for a GPU to count.
    sequence = torch.repeat_interleave(sequence, ends.diff(), output_size=tokens)
    return torch.arange(tokens, device=ends.device) - ends[sequence] + sequence * longest
