"""The text tokenizer: byte-level BPE by the ``tokenizers`` library, with the system's own markers.

The markers are ordinary special tokens. A medium's marker is repeated once for every
language-model token of that medium, and the towers' embeddings take those places.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from data_pipeline.errors import DataError
from data_pipeline.reading.medium import MODALITIES

PAD, BEGIN, END, ANSWER = "<pad>", "<bos>", "<eos>", "<ans>"
MARKERS = tuple(f"<{modality}>" for modality in MODALITIES)
SPECIAL = (PAD, BEGIN, END, ANSWER, *MARKERS)


class TextTokenizer:
    """A BPE tokenizer whose special tokens are known by name.

    Attributes:
        pad, begin, end, answer: ids of the structural tokens.
        markers: id of each modality's marker.
    """

    def __init__(self, tokenizer: Tokenizer, origin: str) -> None:
        missing = [token for token in SPECIAL if tokenizer.token_to_id(token) is None]
        if missing:
            raise DataError(f"The tokenizer {origin} lacks the special tokens {missing}.")
        self._tokenizer = tokenizer
        # Text from a data set must not be able to spell a marker.
        self._tokenizer.encode_special_tokens = True
        ids = {token: int(tokenizer.token_to_id(token) or 0) for token in SPECIAL}
        self.pad, self.begin = ids[PAD], ids[BEGIN]
        self.end, self.answer = ids[END], ids[ANSWER]
        self.markers = {modality: ids[f"<{modality}>"] for modality in MODALITIES}
        self._structural = frozenset(ids.values())

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
            special_tokens=list(SPECIAL),
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
