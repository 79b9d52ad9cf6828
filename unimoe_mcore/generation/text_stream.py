"""Text as it grows with the tokens of an answer, in pieces that are whole UTF-8."""

from __future__ import annotations

from data_pipeline.conversation.tokenizer import TextTokenizer

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """Hands out text as soon as no later token can change it.

    A byte-level token may end in the middle of a character; those at the end are held back until
    the rest has come. The pieces together are the tokenizer's text of all tokens.
    """

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._told = 0  # characters

    def push(self, token: int) -> str:
        """The text that one more token brings; often empty."""
        self._ids.append(token)
        return self._beyond(self._tokenizer.decode(self._ids).rstrip(_UNFINISHED))

    def rest(self) -> str:
        """What was held back, when no more tokens come."""
        return self._beyond(self._tokenizer.decode(self._ids))

    def _beyond(self, text: str) -> str:
        piece = text[self._told :]
        self._told += len(piece)
        return piece
