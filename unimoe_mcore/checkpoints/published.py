"""A published model as it was read, whatever files it came in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from data_pipeline.conversation.tokenizer import TextTokenizer
from unimoe_mcore.checkpoints.deferred import Deferred
from unimoe_mcore.checkpoints.llama import Rule
from unimoe_mcore.config.model import LanguageConfig


@dataclass(frozen=True)
class Part:
    """What lies beside a base's own weights: an artefact that stands on it.

    Attributes:
        folder: its name in the base's folder.
        kind: of the stage that would give such an artefact.
        rules: its tensors.
        towers: for a connector: its tower's configuration (``Manifest.towers``).
    """

    folder: str
    kind: str
    rules: Sequence[Rule]
    towers: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Published:
    """A published model.

    Attributes:
        language: shape of its language model.
        tensors: name -> values, in transformers' layout; names are those of the rules.
        tokenizer: its tokenizer, with media markers.
        rules: the base's tensors.
        parts: what lies beside it.
        sizes: of axes that the language model has not.
        skipped: tensor that is not taken -> why.
        recipe: what else a recipe must say, by key.
        unused: keys of its configuration that nothing here asks for.
        digest: of what it was read from.
    """

    language: LanguageConfig
    tensors: Mapping[str, Deferred]
    tokenizer: TextTokenizer
    rules: Sequence[Rule]
    parts: Sequence[Part] = ()
    sizes: Mapping[str, int] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)
    recipe: Mapping[str, str] = field(default_factory=dict)
    unused: Sequence[str] = ()
    digest: str = ""
