"""Rows that are lengthened: what collation with a larger multiple makes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from data_pipeline.reading.collate import collate


def sample(length: int) -> Any:
    tokens = SimpleNamespace(ids=list(range(10, 10 + length)), learn=[0, *[1] * (length - 1)])
    return SimpleNamespace(tokens=tokens, media=[], group="text")


@pytest.mark.parametrize("lengths", [[], [5], [7, 3, 12], [16, 16]])
def test_a_lengthened_row_is_one_that_was_collated_longer(lengths: list[int]) -> None:
    samples = [sample(length) for length in lengths]
    short, long = collate(samples, 3, 32), collate(samples, 3, 80)
    lengthened = short.lengthened(80)
    for name, wanted in vars(long).items():
        if isinstance(wanted, torch.Tensor) and name != "cu_seqlens":
            assert torch.equal(getattr(lengthened, name), wanted), name
    assert (lengthened.tokens, lengthened.label_tokens) == (long.tokens, long.label_tokens)
    ends = lengthened.cu_seqlens.tolist()
    assert ends[: len(lengths) + 1] == long.cu_seqlens.tolist()[: len(lengths) + 1]
    assert ends == sorted(set(ends))
    assert ends[-1] == 80
    assert int(lengthened.cu_seqlens.diff().max()) <= lengthened.max_seqlen
    assert short.lengthened(32) is short
