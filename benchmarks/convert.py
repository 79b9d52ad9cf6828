"""How fast a published model becomes a base, and in how much memory.

A Llama with the widths of 7B and few blocks, random, in pieces as they are published, is converted
by the command that a user types. A process that only says its help tells what the imports take.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from benchmarks.side_by_side import write

HIDDEN, FFN, HEADS, VOCABULARY, BLOCKS = 4096, 11008, 32, 32000, 4
PIECE = 8e8
"""Bytes of a piece, at most."""
FORMS = ("safetensors", "bin")


@dataclass(frozen=True)
class Cost:
    """What a process took.

    Attributes:
        seconds: from its start to its end.
        peak: bytes of its largest resident set; mapped files count.
    """

    seconds: float
    peak: int


def cost(*arguments: str) -> Cost:
    """Run the command; measure the process.

    Raises:
        RuntimeError: if it fails.
    """
    began = time.perf_counter()
    command = [sys.executable, "-m", "unimoe_mcore.convert", *arguments]
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            output.seek(0)
            raise RuntimeError(output.read().decode()[-4000:])
    return Cost(time.perf_counter() - began, used.ru_maxrss * 1024)


def shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for block in range(BLOCKS):
        there = f"model.layers.{block}."
        for name in "qkvo":
            found[f"{there}self_attn.{name}_proj.weight"] = (HIDDEN, HIDDEN)
        for name in ("gate", "up"):
            found[f"{there}mlp.{name}_proj.weight"] = (FFN, HIDDEN)
        found[f"{there}mlp.down_proj.weight"] = (HIDDEN, FFN)
        for name in ("input_layernorm", "post_attention_layernorm"):
            found[f"{there}{name}.weight"] = (HIDDEN,)
    return found | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}


def make(folder: Path, form: str) -> None:
    """A random model in pieces, bf16, with a tokenizer that has ChatML's tokens."""
    folder.mkdir(parents=True)
    facts = {
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": BLOCKS,
        "num_attention_heads": HEADS,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "vocab_size": VOCABULARY,
    }
    (folder / "config.json").write_text(json.dumps(facts))
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<spare_{n}>" for n in range(4))]
    tokens = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={t: n for n, t in enumerate(tokens)}, merges=[]))
    tokenizer.add_special_tokens([AddedToken(each, special=True) for each in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    stem = "model" if form == "safetensors" else "pytorch_model"
    places: dict[str, str] = {}
    piece: dict[str, torch.Tensor] = {}
    number = 0

    def save() -> None:
        name = f"{stem}-{number}.{form}"
        if form == "bin":
            torch.save(piece, folder / name)
        else:
            save_file(piece, folder / name)
        places.update(dict.fromkeys(piece, name))
        piece.clear()

    for name, shape in shapes().items():
        value = torch.randn(shape, dtype=torch.bfloat16)
        if sum(each.nbytes for each in piece.values()) + value.nbytes > PIECE:
            save()
            number += 1
        piece[name] = value
    save()
    index = {"metadata": {}, "weight_map": places}
    (folder / f"{stem}.{form}.index.json").write_text(json.dumps(index))


def row(form: str, folder: Path, imports: Cost) -> str:
    """One form."""
    source, base = folder / form, folder / f"{form}-base"
    make(source, form)
    sizes = [path.stat().st_size for path in source.glob(f"*.{form}")]
    total, largest = sum(sizes), max(sizes)
    found = cost(str(source), str(base))
    shutil.rmtree(source)
    shutil.rmtree(base)
    own = found.peak - imports.peak
    work = found.seconds - imports.seconds
    return (
        f"| {form} | {total / 1e9:.2f} in {len(sizes)} | {largest / 1e6:.0f} | {found.seconds:.1f} "
        f"| {imports.seconds:.1f} | {total / 1e6 / work:.0f} | {found.peak / 1e6:.0f} "
        f"| {imports.peak / 1e6:.0f} | {own / largest:.2f} |"
    )


COLUMNS = (
    "form",
    "GB, pieces",
    "largest piece, MB",
    "whole command, s",
    "imports, s",
    "MB/s without imports",
    "peak, MB",
    "peak of imports, MB",
    "peak above imports / largest piece",
)


def main() -> None:
    folder = Path(tempfile.mkdtemp(dir=sys.argv[1] if sys.argv[1:] else None))
    cost("--help")  # not counted: the files of the packages come into memory
    imports = cost("--help")
    rows = [row(form, folder, imports) for form in FORMS]
    shutil.rmtree(folder)
    write(
        "convert",
        "How fast a published model becomes a base, and in how much memory",
        rows,
        COLUMNS,
        (
            f"A Llama with the widths of 7B and {BLOCKS} blocks, random, bf16, just written (so "
            "that reading comes from the page cache as far as it holds it); the base is synced to "
            "disk. *Peak*: largest resident set of the process, mapped files included.",
        ),
    )


if __name__ == "__main__":
    main()
