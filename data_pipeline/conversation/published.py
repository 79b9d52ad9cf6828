"""Tokenizers of published language models, made fit for media: markers take spare special tokens.

A published vocabulary has no token for a medium. It does have special tokens that neither text nor
its chat template uses (of source-code corpora, reserved ones): the last of these become the
markers. The embedding table keeps its size, and their rows are never read, because a medium's
embeddings take their places.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any

from tokenizers import AddedToken, Tokenizer

from data_pipeline.conversation.templates import TEMPLATES, ChatTemplate
from data_pipeline.conversation.tokenizer import MARKERS, TextTokenizer
from data_pipeline.errors import DataError


def with_markers(
    tokenizer: Tokenizer, origin: str, template: str = "", room: bool = False
) -> TextTokenizer:
    """A published tokenizer whose last spare special tokens are renamed to the media's markers.

    Args:
        tokenizer: of the published model; it must have a known chat template's tokens.
        origin: what it is called in messages.
        template: the chat template's name; empty for the first whose tokens it has.
        room: whether the embedding can be given rows: markers for which there is no spare token
            become new ones, behind all others.

    Raises:
        DataError: if it has no known chat template's tokens, or too few spare ones.
    """
    facts: dict[str, Any] = json.loads(tokenizer.to_str())
    special = {token["content"]: token["id"] for token in facts["added_tokens"] if token["special"]}
    chosen = _template(special, origin, template)
    lacking = [marker for marker in MARKERS if marker not in special]
    kept = {*chosen.special, *MARKERS, *_in_use(facts)}
    spare = sorted((number, name) for name, number in special.items() if name not in kept)
    if len(spare) < len(lacking) and room:
        tokenizer.add_special_tokens(
            [AddedToken(each, special=True, normalized=False) for each in lacking]
        )
        return _checked(TextTokenizer(tokenizer, origin), chosen, origin)
    if len(spare) < len(lacking):
        raise DataError(
            f"The tokenizer {origin} has {len(spare)} special tokens to spare, the media's markers "
            f"need {len(lacking)}."
        )
    taken = spare[len(spare) - len(lacking) :]
    renamed = {name: marker for (_, name), marker in zip(taken, lacking, strict=True)}
    for token in facts["added_tokens"]:
        token["content"] = renamed.get(token["content"], token["content"])
    vocabulary = facts["model"]["vocab"]
    facts["model"]["vocab"] = {renamed.get(name, name): i for name, i in vocabulary.items()}
    made = TextTokenizer(Tokenizer.from_str(json.dumps(facts)), origin)
    return _checked(made, chosen, origin)


def _in_use(facts: dict[str, Any]) -> set[str]:
    """Special tokens that the tokenizer itself makes: of what is unknown, and around a text."""
    around = (facts.get("post_processor") or {}).get("special_tokens") or {}
    return {*filter(None, [facts["model"].get("unk_token")]), *around}


def _checked(made: TextTokenizer, chosen: ChatTemplate, origin: str) -> TextTokenizer:
    """Refuse a template that is not the one by which the tokenizer will be read again.

    Raises:
        DataError: naming both.
    """
    if made.template != chosen:
        raise DataError(
            f"The tokenizer {origin} also has the structural tokens of {made.template.name}, which "
            f"would be taken for {chosen.name}: choose that one."
        )
    return made


def _template(special: Collection[str], origin: str, name: str) -> ChatTemplate:
    """The template of a name, or the first whose structural tokens are there.

    Raises:
        DataError: if there is none.
    """
    asked = [each for each in TEMPLATES if name in ("", each.name, each.name.rsplit("-", 1)[0])]
    if not asked:
        known = ", ".join(each.name for each in TEMPLATES)
        raise DataError(f"There is no chat template {name!r}: choose one of {known}.")
    found = next((each for each in asked if set(each.special) <= set(special)), None)
    if found is None:
        known = "; ".join(f"{each.name}: {', '.join(each.special)}" for each in asked)
        raise DataError(
            f"The tokenizer {origin} has the structural tokens of no known chat template ({known})."
        )
    return found
