"""Flips of experts: found, named, and told from faults by their margin."""

from __future__ import annotations

import pytest
import torch

from unimoe_mcore.evaluation.choices import Flip, chosen_and_margin, flips


def test_margin_is_between_the_last_chosen_and_the_first_not_chosen() -> None:
    logits = torch.tensor([[3.0, 1.0, 0.5, 2.0], [0.0, -1.0, -1.5, -1.25]])
    chosen = torch.zeros(2, 4, dtype=torch.bool).scatter(1, logits.topk(2).indices, True)
    mask, margin = chosen_and_margin(logits, chosen)
    assert mask.tolist() == [0b1001, 0b0011]
    assert margin.tolist() == [1.0, 0.25]


REFERENCE = {"0/d/a/0": (3, 0.5), "0/d/a/1": (5, 1e-6), "2/d/a/1": (3, 0.25)}


def test_flips_are_named_the_farthest_from_a_tie_first() -> None:
    assert flips(REFERENCE, REFERENCE) == []
    ours = REFERENCE | {"0/d/a/1": (6, 2e-6), "2/d/a/1": (9, 0.125)}
    assert flips(ours, REFERENCE) == [Flip("2/d/a/1", 0.25), Flip("0/d/a/1", 2e-6)]


def test_other_tokens_than_in_the_reference_are_no_comparison() -> None:
    with pytest.raises(ValueError, match="1 more, 1 fewer"):
        flips({"0/d/a/0": (3, 0.5), "0/d/a/1": (5, 1e-6), "2/d/b/1": (3, 0.25)}, REFERENCE)
