"""A small byte-level BPE with ChatML's structural tokens."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from tests.checkpoints.small_gguf import SPECIAL, TOKENS


def tokenizer(special: tuple[str, ...] = SPECIAL) -> Tokenizer:
    """A tokenizer with these special tokens; of the default ones five are to spare."""
    tokens = [*special, *TOKENS[len(SPECIAL) :]]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[("Ġ", "t"), ("h", "e"), ("Ġt", "he")]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(each, special=True, normalized=False) for each in special])
    return made
