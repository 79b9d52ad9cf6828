"""The tokenizer of a published model's folder."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from tokenizers import Tokenizer

from unimoe_mcore.checkpoints.safetensors_file import said

FAST = "tokenizer.json"
SLOW = "tokenizer.model"
MOST_TOKENIZER = 1 << 26
"""Bytes of a ``tokenizer.json``; that of Llama 3 takes 17 MB with all its names."""


def read_tokenizer(folder: Path) -> Tokenizer:
    """A folder's ``tokenizer.json``, or made of its ``tokenizer.model`` (SentencePiece).

    Raises:
        ValueError: if there is none, or none that can be read.
        OSError: if it cannot be read.
    """
    path = folder / FAST
    if not path.is_file():
        return _of_sentencepiece(folder)
    if path.stat().st_size > MOST_TOKENIZER:
        raise ValueError(f"{FAST} is longer than {MOST_TOKENIZER} bytes")
    try:
        return Tokenizer.from_str(path.read_text(encoding="utf8"))
    except Exception as error:  # the library raises a bare Exception on whatever it cannot read
        raise ValueError(f"{FAST} cannot be read ({said(error)})") from error


def _of_sentencepiece(folder: Path) -> Tokenizer:
    """The tokenizer that transformers makes of a folder with ``tokenizer.model``, Llama's form.

    Raises:
        ValueError: if there is none, it cannot be read, or the package that reads it is missing.
    """
    path = folder / SLOW
    if not path.is_file():
        raise ValueError(f"it has neither {FAST} nor {SLOW}")
    if path.stat().st_size > MOST_TOKENIZER:
        raise ValueError(f"{SLOW} is longer than {MOST_TOKENIZER} bytes")
    if find_spec("sentencepiece") is None:
        raise ValueError(f"it has only {SLOW}: pip install sentencepiece, which reads it")
    from transformers import LlamaTokenizer  # seconds, which few need

    try:
        made = LlamaTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # whatever a broken file leads three libraries to
        raise ValueError(f"{SLOW} cannot be read ({said(error)})") from error
    backend: Tokenizer = made.backend_tokenizer
    return backend
