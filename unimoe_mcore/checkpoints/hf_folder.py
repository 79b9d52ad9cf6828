"""Published language models in a folder of Hugging Face's form: config, weights, tokenizer."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from data_pipeline.conversation.published import with_markers
from data_pipeline.conversation.tokenizer import TextTokenizer
from unimoe_mcore.checkpoints.deferred import Deferred
from unimoe_mcore.checkpoints.families import SKIPPED, Family
from unimoe_mcore.checkpoints.hf_config import CONFIG, Described, read_config
from unimoe_mcore.checkpoints.hf_files import read_weights
from unimoe_mcore.checkpoints.hf_tokenizer import FAST, read_tokenizer
from unimoe_mcore.checkpoints.llama import Rule, rules_of
from unimoe_mcore.checkpoints.llava import projector_of
from unimoe_mcore.checkpoints.mixtral import first_expert, mixture_of, separated
from unimoe_mcore.checkpoints.published import Part, Published
from unimoe_mcore.config.errors import UserError
from unimoe_mcore.config.model import LanguageConfig

PADDED_TO = 64
"""What the rows of an embedding are a multiple of, so that tensor-parallel ranks share them evenly
(and a GPU's matrix units are full)."""


def is_folder(source: Path) -> bool:
    """Whether it is a folder with a ``config.json``."""
    return (source / CONFIG).is_file()


def read_folder(folder: Path, template: str = "") -> Published:
    """Read a published model; its weights are read when they are wanted.

    Args:
        template: name of the chat template; empty for the one that its tokenizer has the tokens of.

    Raises:
        UserError: if it is damaged, or holds something that cannot be built here.
        DataError: if its tokenizer does not fit.
    """
    try:
        described = read_config(folder)
        bare = read_tokenizer(folder)
    except (ValueError, OSError) as error:
        raise UserError(f"{folder} cannot be used: {error}.") from error
    found, files = read_weights(folder)
    tokens = bare.get_vocab_size()
    tokenizer = with_markers(bare, str(folder / FAST), template, room=True)
    try:
        tensors, skipped = named(separated(found), described.family)
        described = replace(described, language=_padded(described, tokens, tokenizer, len(tensors)))
        rules, parts, sizes, recipe = _tables(described, tensors)
    except ValueError as error:
        raise UserError(f"{folder} cannot be used: {error}.") from error
    return Published(
        described.language,
        tensors,
        tokenizer,
        rules,
        parts,
        sizes,
        skipped,
        recipe,
        described.unused,
        _digest([folder / CONFIG, folder / FAST, *files]),
    )


def named(
    found: Mapping[str, Deferred], family: Family
) -> tuple[dict[str, Deferred], dict[str, str]]:
    """Tensors by the names of our tables, and those that the family leaves out, with the reason.

    Raises:
        ValueError: if two would have one name.
    """
    tensors: dict[str, Deferred] = {}
    skipped: dict[str, str] = {}
    for name, tensor in found.items():
        reason = _first({**SKIPPED, **family.skipped}, name)
        if reason is not None:
            skipped[name] = reason[1]
            continue
        renamed = _first(family.renamed, name)
        known = re.sub(renamed[0], renamed[1], name) if renamed else name
        if known in tensors:
            raise ValueError(f"{name} is there twice, under two names")
        tensors[known] = tensor
    return tensors, skipped


def _first(table: Mapping[str, str], name: str) -> tuple[str, str] | None:
    return next((entry for entry in table.items() if re.fullmatch(entry[0], name)), None)


def _padded(
    described: Described, tokens: int, tokenizer: TextTokenizer, tensors: int
) -> LanguageConfig:
    """The language model with rows for all tokens, a multiple of ``PADDED_TO``.

    Args:
        tokens: of its tokenizer, without markers that got tokens of their own.
        tensors: their number, which bounds what a config can say of blocks.

    Raises:
        ValueError: if the tokenizer has more tokens than the embedding.
    """
    language = described.language
    if language.blocks > tensors:
        raise ValueError(f"it says {language.blocks} blocks, and has {tensors} tensors")
    if tokens > language.vocabulary:
        raise ValueError(f"its {tokens} tokens are more than vocab_size={language.vocabulary}")
    rows = -(-max(language.vocabulary, tokenizer.size) // PADDED_TO) * PADDED_TO
    if rows == language.vocabulary:
        return language
    return replace(language, vocabulary=rows, unpadded_vocabulary=language.vocabulary)


def _tables(
    described: Described, tensors: Mapping[str, Deferred]
) -> tuple[list[Rule], Sequence[Part], dict[str, int], dict[str, str]]:
    """The base's rules, what lies beside it, sizes of its axes, and what a recipe must say.

    Raises:
        ValueError: if that cannot be built here.
    """
    family, language = described.family, described.language
    if family.experts:
        parts, recipe = mixture_of(language, described.whole)
        return first_expert(language), parts, {"experts": len(parts)}, recipe
    if family.projector:
        parts, sizes, recipe = projector_of(family.projector, described.whole, tensors)
        return rules_of(language), parts, sizes, recipe
    return rules_of(language), [], {}, {}


def _digest(files: Sequence[Path]) -> str:
    """Of what a model was read from: every small file's bytes, every large one's name and size.

    What the weights were is in the base's own digests, one for each tensor.
    """
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        if path.suffix == ".json":
            digest.update(path.read_bytes())
    return digest.hexdigest()
