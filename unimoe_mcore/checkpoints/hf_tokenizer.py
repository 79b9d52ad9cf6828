"""The tokenizer of a published model's folder."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer

from unimoe_mcore.checkpoints.safetensors_file import said

FAST = "tokenizer.json"
SLOW = "tokenizer.model"
MOST_TOKENIZER = 1 << 26
"""Bytes of a ``tokenizer.json``; that of Llama 3 takes 17 MB with all its names."""


def read_tokenizer(folder: Path) -> Tokenizer:
    """A folder's ``tokenizer.json``.

    Raises:
        ValueError: if there is none, or none that can be read.
        OSError: if it cannot be read.
    """
    path = folder / FAST
    if not path.is_file():
        only = f"only {SLOW} (SentencePiece)" if (folder / SLOW).is_file() else "no tokenizer"
        raise ValueError(
            f"it has {only}: make {FAST} of it, by AutoTokenizer.from_pretrained(FOLDER)"
            ".save_pretrained(FOLDER) of transformers with sentencepiece installed"
        )
    if path.stat().st_size > MOST_TOKENIZER:
        raise ValueError(f"{FAST} is longer than {MOST_TOKENIZER} bytes")
    try:
        return Tokenizer.from_str(path.read_text(encoding="utf8"))
    except Exception as error:  # the library raises a bare Exception on whatever it cannot read
        raise ValueError(f"{FAST} cannot be read ({said(error)})") from error
