"""Tokenizers of published language models, made fit for media: markers take spare special tokens.

A published vocabulary has no token for a medium. It does have special tokens that neither text nor
its chat template uses (of source-code corpora, reserved ones): the last of these become the
markers. The embedding table keeps its size, and their rows are never read, because a medium's
embeddings take their places.
"""

from __future__ import annotations

import json
from typing import Any

from tokenizers import Tokenizer

from data_pipeline.conversation.templates import TEMPLATES
from data_pipeline.conversation.tokenizer import MARKERS, TextTokenizer
from data_pipeline.errors import DataError


def with_markers(tokenizer: Tokenizer, origin: str) -> TextTokenizer:
    """A published tokenizer whose last spare special tokens are renamed to the media's markers.

    Args:
        tokenizer: of the published model; it must have a known chat template's tokens.
        origin: what it is called in messages.

    Raises:
        DataError: if it has no known chat template's tokens, or too few spare ones.
    """
    facts: dict[str, Any] = json.loads(tokenizer.to_str())
    special = {token["content"]: token["id"] for token in facts["added_tokens"] if token["special"]}
    template = next((t for t in TEMPLATES if set(t.special) <= set(special)), None)
    if template is None:
        known = "; ".join(f"{t.name}: {', '.join(t.special)}" for t in TEMPLATES)
        raise DataError(
            f"The tokenizer {origin} has the structural tokens of no known chat template ({known})."
        )
    lacking = [marker for marker in MARKERS if marker not in special]
    spare = sorted(
        (number, name) for name, number in special.items() if name not in template.special
    )
    spare = [(number, name) for number, name in spare if name not in MARKERS]
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
    return TextTokenizer(Tokenizer.from_str(json.dumps(facts)), origin)
