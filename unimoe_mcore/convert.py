"""``python -m unimoe_mcore.convert SOURCE FOLDER``: a published model as a base.

SOURCE is a folder of Hugging Face's form (``config.json``, ``tokenizer.json``, weights as
safetensors or ``.bin``) with a Llama, Mistral, Mixtral or LLaVA, or a Llama in a GGUF file
(``.gguf``). FOLDER then holds what a base stage gives: weights under our names, tokenizer,
manifest; recipes name it in ``stage.base``. What stands on the base (a mixture's experts, a
connector) lies in folders within. The last lines say what ``model.language`` must be, and which
tensors were not taken and why. ``docs/checkpoints.md`` has more.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from unimoe_mcore.runtime.devices import prepare_device

prepare_device()

import torch  # noqa: E402

from unimoe_mcore.checkpoints.based import check_replaceable, write_base  # noqa: E402
from unimoe_mcore.checkpoints.gguf_file import read_gguf  # noqa: E402
from unimoe_mcore.checkpoints.hf_folder import is_folder, read_folder  # noqa: E402
from unimoe_mcore.checkpoints.importing import Imported, import_model  # noqa: E402
from unimoe_mcore.checkpoints.published import Published  # noqa: E402
from unimoe_mcore.compose import speak  # noqa: E402
from unimoe_mcore.config.errors import UserError  # noqa: E402
from unimoe_mcore.runtime.precision import DTYPES  # noqa: E402


@dataclass(frozen=True)
class Source:
    """A form in which models are published.

    Attributes:
        name: what messages call it.
        fits: whether a path is of this form.
        read: reads it, with the chat template that was asked for.
    """

    name: str
    fits: Callable[[Path], bool]
    read: Callable[[Path, str], Published]


SOURCES = (
    Source("a GGUF file (.gguf)", lambda path: path.suffix == ".gguf", read_gguf),
    Source("a folder with config.json", is_folder, read_folder),
)
"""The first that fits is taken."""


def convert(
    source: Path, folder: Path, dtype: torch.dtype, template: str = ""
) -> tuple[Published, Imported]:
    """Write a base folder from a published model; it is visible only when it is whole.

    Args:
        dtype: in which the weights are stored.
        template: name of the chat template; empty for the one that the tokenizer has the tokens of.

    Raises:
        UserError: if the source cannot be read, has tensors without a place here or lacks one, or
            the folder is there and holds something else than a converted base.
        DataError: if its tokenizer does not fit.
    """
    form = next((each for each in SOURCES if each.fits(source)), None)
    if form is None:
        known = " or ".join(each.name for each in SOURCES)
        raise UserError(f"{source} cannot be converted: a source is {known}.")
    check_replaceable(folder)
    published = form.read(source, template)
    imported = import_model(published, str(source))
    write_base(folder, published, imported, dtype, source.resolve().stem)
    return published, imported


def main(arguments: Sequence[str]) -> int:
    """Read, lay out, write, say what was done."""
    parser = argparse.ArgumentParser(
        prog="python -m unimoe_mcore.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", type=Path, help="the published model's file or folder")
    parser.add_argument("folder", type=Path, help="folder of the base")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bf16", help="of the weights")
    parser.add_argument(
        "--template", default="", help="chat template, where the tokenizer fits several"
    )
    given = parser.parse_args(arguments)
    published, imported = convert(
        given.source, given.folder, DTYPES[given.dtype], template=given.template
    )
    for line in said(given.folder, published, imported, given.dtype):
        print(line)
    return 0


def said(folder: Path, published: Published, imported: Imported, dtype: str) -> list[str]:
    """What was done: what is where, what was left out and why, and what a recipe must say."""
    total = sum(math.prod(value.shape) for value in imported.tensors.values())
    lines = [
        f"{folder}: {total / 1e6:.2f} M parameters in {dtype}, {len(imported.used)} tensors taken, "
        f"{len(imported.skipped)} left out, chat template {published.tokenizer.template.name}"
    ]
    for part, tensors in imported.parts:
        count = sum(math.prod(value.shape) for value in tensors.values())
        lines.append(f"  {folder / part.folder}: {count / 1e6:.2f} M parameters, {part.kind}")
    for why, count in Counter(imported.skipped.values()).items():
        names = [name for name, reason in imported.skipped.items() if reason == why]
        more = f" and {count - 1} more" if count > 1 else ""
        lines.append(f"  left out: {names[0]}{more}: {why}")
    if published.unused:
        lines.append(f"  not looked at in config.json: {', '.join(published.unused)}")
    shape = ", ".join(f"{key}: {value}" for key, value in asdict(published.language).items())
    lines.append(f"model.language: {{{shape}}}")
    return lines + [
        f"{key}: {value.replace('FOLDER', str(folder))}" for key, value in published.recipe.items()
    ]


if __name__ == "__main__":
    sys.exit(speak(main))
