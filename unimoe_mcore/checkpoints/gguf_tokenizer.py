"""The byte-level BPE in a GGUF file's metadata."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from unimoe_mcore.checkpoints.facts import Facts, listed, shown, text

_CONTROL = 3
"""GGUF's type of special tokens."""

PRE_TOKENIZERS = {
    "smollm": lambda: pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    ),
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
}
"""``tokenizer.ggml.pre`` -> how text is cut into words before byte pairs are merged."""


def read_tokenizer(facts: Facts) -> Tokenizer:
    """The tokenizer that a file's metadata describe.

    Raises:
        ValueError: if it is of another kind, or its parts do not fit together.
    """
    kind, cut = text(facts, "tokenizer.ggml.model"), text(facts, "tokenizer.ggml.pre", "none")
    if kind != "gpt2" or cut not in PRE_TOKENIZERS:
        known = ", ".join(PRE_TOKENIZERS)
        raise ValueError(f"its tokenizer is {shown(kind)} / {shown(cut)}, known are gpt2 / {known}")
    tokens = listed(facts, "tokenizer.ggml.tokens", str)
    kinds = listed(facts, "tokenizer.ggml.token_type", int)
    vocabulary = {token: number for number, token in enumerate(tokens)}
    if len(vocabulary) < len(tokens) or "" in vocabulary:
        raise ValueError("tokenizer.ggml.tokens has a token twice, or an empty one")
    if len(kinds) != len(tokens):
        raise ValueError(f"its {len(tokens)} tokens have {len(kinds)} types")
    merges = _merges(listed(facts, "tokenizer.ggml.merges", str), vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[cut]()
    tokenizer.decoder = decoders.ByteLevel()
    special = [
        AddedToken(token, special=True, normalized=False)
        for token, each in zip(tokens, kinds, strict=True)
        if each == _CONTROL
    ]
    tokenizer.add_special_tokens(special)
    return tokenizer


def _merges(lines: list[str], vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """The pairs that are merged: both halves, and what becomes of them, are tokens.

    Raises:
        ValueError: naming the first that is none.
    """
    pairs = []
    for line in lines:
        left, _, right = line.partition(" ")
        if not {left, right, left + right} <= vocabulary.keys():
            raise ValueError(f"the merge {shown(line)} is not one of two tokens into a third")
        pairs.append((left, right))
    return pairs
