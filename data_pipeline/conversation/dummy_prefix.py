"""SentencePiece's dummy prefix: every piece of text begins with a blank of its own."""

from __future__ import annotations

from tokenizers import Tokenizer, normalizers, pre_tokenizers

_BLANK = "▁"  # U+2581, SentencePiece's sign for a blank


def add_dummy_prefix(tokenizer: Tokenizer) -> None:
    """Make a Llama tokenizer in its newer form tokenise as SentencePiece does, in place.

    The newer form (``Metaspace``) leaves the blank out where a piece begins with one: behind a
    medium's marker `` ASSISTANT`` would lose a token that models trained with SentencePiece have
    seen. Tokenizers of the older form, and those that add no blank at all, stay as they are.
    """
    cut = tokenizer.pre_tokenizer
    if isinstance(cut, pre_tokenizers.Metaspace) and cut.prepend_scheme != "never":
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend(_BLANK), normalizers.Replace(" ", _BLANK)]
        )
        tokenizer.pre_tokenizer = None
