"""The text tokenizer: BPE by the ``tokenizers`` library, with the system's own markers.

The markers are ordinary special tokens. A medium's marker is repeated once for every
language-model token of that medium, and the towers' embeddings take those places. Which chat
template a base was trained with, its tokenizer's structural tokens say.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from data_pipeline.conversation.dummy_prefix import add_dummy_prefix
from data_pipeline.conversation.templates import PLAIN, TEMPLATES, ChatTemplate
from data_pipeline.errors import DataError
from data_pipeline.modalities import FIRST, MODALITIES

MARKERS = tuple(f"<{modality}>" for modality in MODALITIES)
_NEEDED = tuple(f"<{modality}>" for modality in FIRST)
"""A tokenizer older than another modality lacks that one's."""


class TextTokenizer:
    """A BPE tokenizer whose special tokens are known by name.

    Attributes:
        template: the chat template whose structural tokens it has.
        pad: id of the token that fills up rows.
        end: id of the token that ends an answer.
        markers: id of each modality's marker; a tokenizer that is older than a modality has none.
    """

    def __init__(self, tokenizer: Tokenizer, origin: str) -> None:
        self.template = _template(tokenizer, origin)
        self._tokenizer = tokenizer
        if self.template.whole:
            add_dummy_prefix(tokenizer)
        # Text from a data set must not be able to spell a marker.
        self._tokenizer.encode_special_tokens = True
        self.pad, self.end = self._id(self.template.pad), self._id(self.template.end)
        ids = {modality: tokenizer.token_to_id(f"<{modality}>") for modality in MODALITIES}
        self.markers = {name: number for name, number in ids.items() if number is not None}
        self._structural = {*map(self._id, self.template.special), *self.markers.values()}
        self._parts: dict[str, list[int]] = {}

    def _id(self, token: str) -> int:
        number = self._tokenizer.token_to_id(token)
        assert number is not None, token  # the template was chosen by what there is
        return int(number)

    def structure(self, part: str) -> list[int]:
        """Ids of a part of the template: structural tokens, and plain text between them."""
        if part not in self._parts:
            ids: list[int] = []
            for piece in self.template.pieces(part):
                ids += [self._id(piece)] if piece in self.template.special else self.encode(piece)
            self._parts[part] = ids
        return self._parts[part]

    @classmethod
    def load(cls, path: Path) -> TextTokenizer:
        """Read a ``tokenizer.json``.

        Raises:
            DataError: if the file is missing or is no tokenizer of this system.
        """
        if not path.is_file():
            raise DataError(f"There is no tokenizer at {path}: run the base stage first.")
        try:
            return cls(Tokenizer.from_file(str(path)), str(path))
        except DataError:
            raise
        except Exception as error:  # the library raises a bare Exception on bad JSON
            raise DataError(f"The tokenizer {path} cannot be read: {error}.") from error

    @classmethod
    def train(cls, texts: Iterable[str], vocabulary: int) -> TextTokenizer:
        """Train a byte-level BPE of at most ``vocabulary`` tokens, special tokens included.

        Deterministic for the same texts in the same order.
        """
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=[*PLAIN.special, *MARKERS],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        return cls(tokenizer, "just trained")

    def save(self, path: Path) -> None:
        """Write ``tokenizer.json``."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._tokenizer.save(str(path))

    def serialised(self) -> str:
        """The tokenizer as the JSON text that ``save`` writes; what fingerprints are taken of."""
        return str(self._tokenizer.to_str())

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text. A special token spelled out in the text stays plain text."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids) if text else []

    def decode(self, ids: list[int]) -> str:
        """Text of token ids, special tokens left out."""
        return str(self._tokenizer.decode(ids, skip_special_tokens=True)).strip()

    def is_text(self, token: int) -> bool:
        """Whether a token stands for text, rather than for structure or for nothing."""
        return 0 <= token < self.size and token not in self._structural

    @property
    def size(self) -> int:
        """Number of tokens."""
        return int(self._tokenizer.get_vocab_size())


def _template(tokenizer: Tokenizer, origin: str) -> ChatTemplate:
    """The chat template that a tokenizer has the structural tokens of.

    Raises:
        DataError: if it lacks those of every template, or the media's markers.
    """
    lacking = {
        template.name: [
            token for token in (*template.special, *_NEEDED) if tokenizer.token_to_id(token) is None
        ]
        for template in TEMPLATES
    }
    for template in TEMPLATES:
        if not lacking[template.name]:
            return template
    least = min(lacking.values(), key=len)
    raise DataError(f"The tokenizer {origin} lacks the special tokens {least}.")
