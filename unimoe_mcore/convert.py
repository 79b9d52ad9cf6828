"""``python -m unimoe_mcore.convert SOURCE FOLDER``: a published model as a base, or parts of one.

SOURCE is a folder of Hugging Face's form (``config.json``, ``tokenizer.json``, weights as
safetensors or ``.bin``) with a Llama, Mistral, Mixtral or LLaVA, or a Llama in a GGUF file
(``.gguf``). FOLDER then holds what a base stage gives: weights under our names, tokenizer,
manifest; recipes name it in ``stage.base``. What stands on the base (a mixture's experts, a
connector) lies in folders within. The last lines say what ``model.language`` must be, and which
tensors were not taken and why. ``docs/checkpoints.md`` has more.

With ``--expert-of BASE`` FOLDER becomes an expert that stands on that base, for ``stage.experts``:
SOURCE is a file that Uni-MoE published (``.bin``, ``.safetensors``), with ``--adapters FILE`` added
to it, or a folder with another model, of which only the MLPs are taken. With ``--routers-of BASE``
it becomes routers to begin with, for ``stage.init_from``. ``docs/stages.md`` has more.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from unimoe_mcore.runtime.devices import prepare_device

prepare_device()

import torch  # noqa: E402

from data_pipeline.shards.integrity import file_sha256  # noqa: E402
from unimoe_mcore.checkpoints.artefact import Manifest, read_manifest  # noqa: E402
from unimoe_mcore.checkpoints.based import (  # noqa: E402
    check_replaceable,
    write_base,
    write_part,
)
from unimoe_mcore.checkpoints.gguf_file import read_gguf  # noqa: E402
from unimoe_mcore.checkpoints.hf_folder import is_folder, read_folder  # noqa: E402
from unimoe_mcore.checkpoints.importing import Imported, import_model  # noqa: E402
from unimoe_mcore.checkpoints.official_experts import (  # noqa: E402
    ALPHA,
    Part,
    read_expert,
    read_routers,
)
from unimoe_mcore.checkpoints.published import Published  # noqa: E402
from unimoe_mcore.compose import speak  # noqa: E402
from unimoe_mcore.config.errors import UserError  # noqa: E402
from unimoe_mcore.config.model import LanguageConfig  # noqa: E402
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


def convert_expert(
    source: Path,
    folder: Path,
    base: Path,
    dtype: torch.dtype,
    adapters: Path | None = None,
    alpha: float = ALPHA,
) -> tuple[Part, Manifest]:
    """Write an expert that stands on a base, of published MLPs; visible only when it is whole.

    Args:
        adapters: a file of adapters that are added to them.
        alpha: their scale.

    Raises:
        UserError: as ``convert``, and if there is no such base.
    """
    if not 0 < alpha < math.inf:
        raise UserError(f"--alpha is {alpha}, it must be a number greater than 0.")
    check_replaceable(folder, "expert")
    facts, language = _standing_on(base, source, "expert")
    part = read_expert(source, language, adapters, alpha)
    return part, _written(folder, facts, part, dtype)


def convert_routers(
    source: Path, folder: Path, base: Path, dtype: torch.dtype
) -> tuple[Part, Manifest]:
    """Write a mixture's routers, which stand on a base, as what a run has trained of it.

    Raises:
        UserError: as ``convert_expert``.
    """
    check_replaceable(folder, "moe")
    facts, language = _standing_on(base, source, "moe")
    part = read_routers(source, language)
    return part, _written(folder, facts, part, dtype)


def _standing_on(base: Path, source: Path, kind: str) -> tuple[Manifest, LanguageConfig]:
    """What an artefact on a base says of itself, and the base's shape."""
    found = read_manifest(base, "The base")
    if found.kind != "base":
        raise UserError(f"{base} was given by a stage of kind {found.kind}, it is no base.")
    facts = Manifest(
        kind=kind,
        hash="",
        stands_on=found.hash,
        expert="",
        run=source.resolve().stem,
        language=found.language,
    )
    return facts, LanguageConfig(**found.language)


def _written(folder: Path, facts: Manifest, part: Part, dtype: torch.dtype) -> Manifest:
    digests = [file_sha256(path) for path in part.files]
    sources = {"published": digests[0]}
    sources |= {f"published {number}": each for number, each in enumerate(digests) if number}
    return write_part(folder, replace(facts, sources=sources), part.tensors, dtype)


def main(arguments: Sequence[str]) -> int:
    """Read, lay out, write, say what was done."""
    given = _parser().parse_args(arguments)
    dtype, base = DTYPES[given.dtype], given.expert_of or given.routers_of
    if base is None:
        if given.adapters:
            raise UserError("--adapters are those of an expert: say --expert-of BASE.")
        published, imported = convert(given.source, given.folder, dtype, given.template)
        lines = said(given.folder, published, imported, given.dtype)
    elif given.expert_of and given.routers_of:
        raise UserError("--expert-of and --routers-of are two conversions: give one of them.")
    elif given.expert_of:
        part, made = convert_expert(
            given.source, given.folder, base, dtype, given.adapters, given.alpha
        )
        lines = [*said_of_part(given.folder, part, made), f"stage.experts: [..., {given.folder}]"]
    else:
        part, made = convert_routers(given.source, given.folder, base, dtype)
        lines = [*said_of_part(given.folder, part, made), f"stage.init_from: {given.folder}"]
    print("\n".join(lines))
    return 0


def _parser() -> argparse.ArgumentParser:
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
    parser.add_argument(
        "--expert-of", type=Path, metavar="BASE", help="the source's MLPs become an expert on it"
    )
    parser.add_argument("--adapters", type=Path, metavar="FILE", help="added to the expert")
    parser.add_argument(
        "--alpha", type=float, default=ALPHA, help="scale of the adapters (default: %(default)g)"
    )
    parser.add_argument(
        "--routers-of", type=Path, metavar="BASE", help="the source's routers, to begin with"
    )
    return parser


def said_of_part(folder: Path, part: Part, made: Manifest) -> list[str]:
    """What was done: what stands on which base, what was left out and why."""
    total = sum(math.prod(value.shape) for value in part.tensors.values())
    dtype = next(iter(made.tensors.values()))["dtype"]
    return [
        f"{folder}: {total / 1e6:.2f} M parameters in {dtype} of {len(part.blocks)} blocks, on "
        f"base {made.stands_on[:12]}",
        *_left_out(part.skipped),
    ]


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
    lines += _left_out(imported.skipped)
    if published.unused:
        lines.append(f"  not looked at in config.json: {', '.join(published.unused)}")
    shape = ", ".join(f"{key}: {value}" for key, value in asdict(published.language).items())
    lines.append(f"model.language: {{{shape}}}")
    return lines + [
        f"{key}: {value.replace('FOLDER', str(folder))}" for key, value in published.recipe.items()
    ]


def _left_out(skipped: Mapping[str, str]) -> Iterator[str]:
    for why, count in Counter(skipped.values()).items():
        first = next(name for name, reason in skipped.items() if reason == why)
        more = f" and {count - 1} more" if count > 1 else ""
        yield f"  left out: {first}{more}: {why}"


if __name__ == "__main__":
    sys.exit(speak(main))
