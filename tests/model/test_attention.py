"""Attention over packed rows against PyTorch's own, sequence by sequence."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from unimoe_mcore.model.attention import PackedAttention

TOLERANCE = 1e-6
"""Everything is in fp64 but for the softmax, whose fp32 leaves errors of some 1e-7."""

HEAD = 8


def attention(heads: int, groups: int, scale: float | None = None) -> PackedAttention:
    config = TransformerConfig(
        num_layers=1,
        hidden_size=heads * HEAD,
        num_attention_heads=heads,
        num_query_groups=groups,
    )
    return PackedAttention(config, 1, AttnMaskType.causal, "self", softmax_scale=scale)


def packing(lengths: list[int], longest: int | None = None) -> PackedSeqParams:
    ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    longest = longest or max(lengths)
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=ends,
        cu_seqlens_kv=ends,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )


def inputs(tokens: int, heads: int, groups: int, seed: int) -> list[Tensor]:
    """Query, key, value: ``[tokens, heads or groups, head]`` fp64."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(tokens, n, HEAD, dtype=torch.float64, generator=generator).requires_grad_()
        for n in (heads, groups, groups)
    ]


def by_sequence(
    query: Tensor, key: Tensor, value: Tensor, lengths: list[int], scale: float | None
) -> Tensor:
    """The reference, ``[tokens, heads * head]``."""
    outputs = []
    for q, k, v in zip(*(x.split(lengths) for x in (query, key, value)), strict=True):
        mixed = F.scaled_dot_product_attention(
            *(x.transpose(0, 1)[None] for x in (q, k, v)),
            is_causal=True,
            scale=scale,
            enable_gqa=True,
        )
        outputs.append(mixed[0].transpose(0, 1).flatten(1))
    return torch.cat(outputs)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=6),
    shape=st.sampled_from([(4, 4), (4, 2), (6, 2), (3, 1)]),
    scale=st.sampled_from([None, 0.7]),
    spare=st.integers(0, 3),
    seed=st.integers(0, 1000),
)
@example(lengths=[1], shape=(4, 2), scale=None, spare=0, seed=0)
@example(lengths=[5, 1, 1, 9], shape=(4, 2), scale=None, spare=0, seed=0)
def test_packed_attention_is_that_of_each_sequence(
    lengths: list[int], shape: tuple[int, int], scale: float | None, spare: int, seed: int
) -> None:
    heads, groups = shape
    packed = packing(lengths, max(lengths) + spare)
    mine = inputs(sum(lengths), heads, groups, seed)
    theirs = [x.detach().clone().requires_grad_() for x in mine]

    output = attention(heads, groups, scale)(*mine, None, packed_seq_params=packed)
    expected = by_sequence(*theirs, lengths, scale)
    assert torch.allclose(output, expected, rtol=0, atol=TOLERANCE)

    direction = torch.randn(output.shape, dtype=torch.float64, generator=torch.manual_seed(seed))
    output.backward(direction)
    expected.backward(direction)
    for x, y in zip(mine, theirs, strict=True):
        assert x.grad is not None
        assert torch.allclose(x.grad, y.grad, rtol=0, atol=10 * TOLERANCE)


def test_no_sequence_sees_another_or_its_own_future() -> None:
    lengths = [4, 3]
    query, key, value = (x.detach() for x in inputs(7, 4, 2, 0))
    module, packed = attention(4, 2), packing(lengths)
    before = module(query, key, value, None, packed_seq_params=packed)
    for changed, unseen in ((3, [0, 1, 2, 4, 5, 6]), (4, [0, 1, 2, 3])):
        other = value.clone()
        other[changed] += 1
        after = module(query, key, other, None, packed_seq_params=packed)
        assert torch.equal(before[unseen], after[unseen])
        assert not torch.equal(before[changed], after[changed])


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, TOLERANCE), (torch.bfloat16, 0.0)]
)
def test_not_packed_it_is_the_same_and_goes_on_token_by_token(
    dtype: torch.dtype, tolerance: float
) -> None:
    query, key, value = (x.detach().to(dtype) for x in inputs(5, 4, 2, 0))
    module = attention(4, 2)
    packed = module(query, key, value, None, packed_seq_params=packing([5]))
    first = module(
        query[:3, None], key[:3, None], value[:3, None], None, attn_mask_type=AttnMaskType.causal
    )
    steps = [first[:, 0]]
    for place in (3, 4):
        new, old = slice(place, place + 1), slice(0, place + 1)
        step = module(
            query[new, None],
            key[old, None],
            value[old, None],
            None,
            attn_mask_type=AttnMaskType.no_mask,
        )
        steps.append(step[:, 0])
    assert torch.allclose(torch.cat(steps), packed, rtol=0, atol=tolerance)


def test_several_tokens_after_a_cache_are_refused() -> None:
    query, key, value = (x[:, None] for x in inputs(4, 4, 2, 0))
    for mask in (AttnMaskType.no_mask, AttnMaskType.causal):
        with pytest.raises(ValueError, match="one token at a time"):
            attention(4, 2)(query[:2], key, value, None, attn_mask_type=mask)
