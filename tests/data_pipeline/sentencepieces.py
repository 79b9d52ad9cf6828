"""A small SentencePiece model of Llama's kind, as SentencePiece reads it and as we do."""

from __future__ import annotations

import io
from pathlib import Path

import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from data_pipeline.conversation.tokenizer import MARKERS

SPECIAL = ("<unk>", "<s>", "</s>")
_TEXT = (
    "A chat between a curious user and an artificial intelligence assistant.",
    "The assistant gives helpful, detailed, and polite answers to the user's questions.",
    "USER: Which bird is this? ASSISTANT: a robin",
    "USER: What do you hear? ASSISTANT: a dog, then two cats and 12 trams",
    "the quick brown fox jumps over the lazy dog's    back in 1999",
)


def train(folder: Path) -> Path:
    """Train the model with Llama's options; returns ``tokenizer.model``."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_TEXT * 20),
        model_writer=model,
        model_type="bpe",
        vocab_size=420,
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        minloglevel=2,
    )
    path = folder / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return path


def converted(path: Path, newer: bool = False) -> Tokenizer:
    """The model as a ``tokenizer.json`` of a published folder has it, with our markers.

    Args:
        newer: in the form with ``Metaspace``, which transformers 5 writes.
    """
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    pieces = [model.id_to_piece(number) for number in range(model.get_piece_size())]
    numbers = {piece: number for number, piece in enumerate(pieces)}
    merges = [
        (piece[:cut], piece[cut:])
        for number, piece in enumerate(pieces)
        if not model.is_byte(number) and piece not in SPECIAL
        for cut in range(1, len(piece))
        if piece[:cut] in numbers and piece[cut:] in numbers
    ]  # in the order of the pieces, which is that of their scores
    tokenizer = Tokenizer(models.BPE(numbers, merges, fuse_unk=True, byte_fallback=True))
    if newer:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens(
        [AddedToken(each, special=True, normalized=False) for each in (*SPECIAL, *MARKERS)]
    )
    return tokenizer
