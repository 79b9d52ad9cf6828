"""Our tensors taken apart into theirs: the tables of ``checkpoints.llama`` read backwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from unimoe_mcore.checkpoints.deferred import Deferred
from unimoe_mcore.checkpoints.llama import Rule, sizes_of
from unimoe_mcore.config.model import LanguageConfig


def unpacked(
    rule: Rule, ours: Deferred, language: LanguageConfig, sizes: dict[str, int] | None = None
) -> Iterator[tuple[str, Deferred]]:
    """Names and values of theirs that a rule makes ours of.

    Args:
        rule: with its numbers filled in.
        ours: our tensor, or half an adapter ``B`` of it, ``[rows, ...]``; rows that only fill up
            are left out.
        sizes: of axes that the language model has not.
    """
    for name, rows in zip(rule.theirs, rows_of(rule, language, sizes), strict=True):
        yield name, Deferred((len(rows), *ours.shape[1:]), _taken(ours, rows))


def rows_of(
    rule: Rule, language: LanguageConfig, sizes: dict[str, int] | None = None
) -> list[Tensor]:
    """For each of theirs which rows of ours it is, ``[its rows]``.

    A rule puts rows in another order and nothing else: what it does with their numbers says which
    row went where.
    """
    known = {**sizes_of(language), **(sizes or {})}
    counts = [known[axes[0]] for axes in rule.shapes]
    numbers = torch.arange(sum(counts))
    order = rule.combine([part[:, None] for part in numbers.split(counts)], language)
    return list(order.flatten().argsort().split(counts))


def _taken(ours: Deferred, rows: Tensor) -> Callable[[], Tensor]:
    return lambda: ours.read()[rows]
