"""A published model's weights laid out as ours: every tensor is used, left out, or refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unimoe_mcore.checkpoints.deferred import Deferred
from unimoe_mcore.checkpoints.llama import EMBEDDING, OUTPUT, Rule, sizes_of
from unimoe_mcore.checkpoints.published import Part, Published
from unimoe_mcore.config.errors import UserError
from unimoe_mcore.config.model import LanguageConfig

ROPE_FACTORS = "rope_freqs.weight"
"""llama.cpp's factors of the rotary frequencies, ``[half a head]``: where they are not 1, as those
of Llama 3.1, positions are scaled."""
UNSCALED = "all its factors are 1"
SAME_AGAIN = "the embedding again, which is also the output layer"

MOST_NAMED = 12
"""Tensors that one message names."""


@dataclass(frozen=True)
class Imported:
    """A model under our names; values are made of theirs when they are read.

    Attributes:
        tensors: our name on disk -> values, of the base.
        parts: what lies beside the base, and its tensors.
        used: names of theirs that were taken.
        skipped: their name -> why it was not taken.
    """

    tensors: dict[str, Deferred]
    parts: list[tuple[Part, dict[str, Deferred]]]
    used: set[str]
    skipped: dict[str, str]


def import_model(published: Published, source: str) -> Imported:
    """Lay a published model's weights out as ours.

    Of their values only those are looked at that decide whether a tensor may be left out.

    Args:
        source: where they come from, for messages.

    Raises:
        UserError: naming the tensors that are missing, have another shape or type, or are not
            known.
    """
    language, theirs = published.language, published.tensors
    sizes = {**sizes_of(language), **published.sizes}
    rules = [*published.rules, *(rule for part in published.parts for rule in part.rules)]
    problems = [problem for rule in rules for problem in _problems(rule, theirs, sizes)]
    used = {name for rule in rules for name in rule.theirs}
    skipped = dict(published.skipped)
    for name in sorted(theirs.keys() - used):
        reason = _left_out(name, theirs, language)
        if reason is None:
            problems.append(f"{name} is not known")
        else:
            skipped[name] = reason
    if OUTPUT in skipped and not _equal(theirs[OUTPUT], theirs[EMBEDDING]):
        problems.append(f"{OUTPUT} is not the embedding, but the two are said to be tied")
    if ROPE_FACTORS in skipped and not _neutral(theirs[ROPE_FACTORS], language):
        problems.append(f"{ROPE_FACTORS} scales the rotary positions, which is not known here")
    if problems:
        raise UserError(f"{source} cannot be used: {some(problems)}.")

    def laid_out(rules: Sequence[Rule]) -> dict[str, Deferred]:
        return {_on_disk(rule): _combined(rule, theirs, sizes, language) for rule in rules}

    parts = [(part, laid_out(part.rules)) for part in published.parts]
    return Imported(laid_out(published.rules), parts, used, skipped)


def import_rules(
    rules: Sequence[Rule],
    theirs: Mapping[str, Deferred],
    language: LanguageConfig,
    source: str,
    sizes: Mapping[str, int] | None = None,
) -> dict[str, Deferred]:
    """Lay tensors out by rules that must use all of them.

    Args:
        source: where they come from, for messages.
        sizes: of axes that the language model has not.

    Returns:
        Our name on disk -> values.

    Raises:
        UserError: naming the tensors that are missing, have another shape or type, or are not
            known.
    """
    every = {**sizes_of(language), **(sizes or {})}
    problems = [problem for rule in rules for problem in _problems(rule, theirs, every)]
    used = {name for rule in rules for name in rule.theirs}
    problems += [f"{name} is not known" for name in sorted(theirs.keys() - used)]
    if problems:
        raise UserError(f"{source} cannot be used: {some(problems)}.")
    return {_on_disk(rule): _combined(rule, theirs, every, language) for rule in rules}


def some(problems: Sequence[str]) -> str:
    """Problems in one sentence: the first ones, and how many there are more."""
    more = len(problems) - MOST_NAMED
    return "; ".join(problems[:MOST_NAMED]) + (f"; and {more} more" if more > 0 else "")


def _left_out(name: str, theirs: Mapping[str, Deferred], language: LanguageConfig) -> str | None:
    """Why a tensor that no rule asks for is not taken; None if there is no reason."""
    if name == ROPE_FACTORS:
        return UNSCALED
    if name == OUTPUT and language.tied and EMBEDDING in theirs:
        return SAME_AGAIN
    return None


def _on_disk(rule: Rule) -> str:
    return rule.ours if rule.ours.startswith("connector.") else f"language_model.{rule.ours}"


def _combined(
    rule: Rule, theirs: Mapping[str, Deferred], sizes: Mapping[str, int], language: LanguageConfig
) -> Deferred:
    parts = [theirs[name] for name in rule.theirs]
    found = sum(part.shape[0] for part in parts)
    rows = sizes[rule.rows] if rule.rows else found

    def read() -> Tensor:
        value = rule.combine([part.read() for part in parts], language)
        if rows == found:
            return value
        return torch.cat([value, value.new_zeros(rows - found, *value.shape[1:])])

    return Deferred((rows, *parts[0].shape[1:]), read)


def _equal(one: Deferred, other: Deferred) -> bool:
    return one.shape == other.shape and torch.equal(one.read(), other.read())


def _neutral(factors: Deferred, language: LanguageConfig) -> bool:
    half = language.hidden // language.heads // 2
    return factors.shape == (half,) and bool((factors.read() == 1).all())


def _problems(rule: Rule, theirs: Mapping[str, Deferred], sizes: Mapping[str, int]) -> list[str]:
    problems = []
    for name, axes in zip(rule.theirs, rule.shapes, strict=True):
        wanted = [sizes[axis] for axis in axes]
        if name not in theirs:
            problems.append(f"{name} is missing")
        elif list(theirs[name].shape) != wanted:
            problems.append(f"{name} is {list(theirs[name].shape)}, not {wanted}")
        elif not theirs[name].floating:
            problems.append(f"{name} has no floating-point numbers: quantised weights are unknown")
    return problems
