"""A report as Markdown, with its pictures and media in files beside it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from itertools import count
from pathlib import Path

from unimoe_mcore.checkpoints.files import write_text
from unimoe_mcore.reporting.document import (
    Block,
    Bullets,
    Code,
    Document,
    Example,
    Examples,
    Figure,
    Folded,
    Heading,
    Listing,
    Panel,
    Paragraph,
    Piece,
    Strong,
    Table,
    Text,
    pieces,
)

FILES = "report-files"
"""Folder of pictures and media, beside the text; what an older report left in it is removed."""


def markdown(document: Document) -> tuple[str, dict[str, bytes]]:
    """The text, and files beside it: path -> bytes."""
    files: dict[str, bytes] = {}
    blocks = [_block(block, files) for block in document.blocks]
    return "\n\n".join(block for block in blocks if block) + "\n", files


def _block(block: Block, files: dict[str, bytes]) -> str:
    match block:
        case Heading(level, text):
            return f"{'#' * level} {escaped(text)}"
        case Paragraph(text):
            return inline(text)
        case Bullets(items):
            return "\n".join(f"- {inline(item)}" for item in items)
        case Table():
            return table(block)
        case Figure(panels):
            # Line by line, so that they stand side by side where there is room.
            return "\n".join(
                f"![{escaped(panel.words)}]({_picture(panel, files)})" for panel in panels
            )
        case Examples(items):
            return "\n\n".join(
                "\n".join(_example(number, item, files)) for number, item in enumerate(items, 1)
            )
        case Listing(text):
            fence = "`" * (max([2, *(len(run) for run in re.findall("`+", text))]) + 1)
            return f"{fence}\n{text.rstrip()}\n{fence}"
        case Folded(summary, inner):
            parts = "\n\n".join(_block(each, files) for each in inner)
            return f"<details><summary>{escaped(summary)}</summary>\n\n{parts}\n\n</details>"


def _picture(panel: Panel, files: dict[str, bytes]) -> str:
    """Add a picture to the files; two of a name (of runs lr0.1 and lr0-1) are numbered.

    Returns:
        Its path.
    """
    # Some file systems take capitals for small letters.
    taken = {path.lower() for path in files}
    names = (f"-{number}" if number > 1 else "" for number in count(1))
    paths = (f"{FILES}/{panel.name}{number}.svg" for number in names)
    path = next(path for path in paths if path.lower() not in taken)
    files[path] = panel.svg.encode()
    return path


def table(block: Table) -> str:
    """A table."""
    rule = ["---" if number < block.words else "---:" for number in range(len(block.head))]
    rows = [[escaped(name) for name in block.head], rule]
    rows += [[inline(cell) for cell in row] for row in block.rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _example(number: int, example: Example, files: dict[str, bytes]) -> Iterator[str]:
    yield f"{number}. {inline(Code(example.name))}"
    for place, medium in enumerate(example.media):
        path = f"{FILES}/example-{number}-{place}.{medium.ending}"
        files[path] = medium.data
        mark = "!" if medium.kind == "picture" else ""
        yield f"   - {mark}[{escaped(medium.words)}]({path})"
    for note in example.notes:
        yield f"   - {escaped(note)}"
    if example.question:
        yield f"   - question: {escaped(example.question)}"
        yield f"   - right answer: {escaped(example.right)}"
    for answer in example.answers:
        mark = "right" if answer.exact else "**wrong**"
        said = escaped(answer.said) or "(nothing)"
        yield f"   - {escaped(answer.run)} says: {said} ({mark})"


def inline(text: Text) -> str:
    """A text with its marks."""
    return "".join(_piece(piece) for piece in pieces(text))


def _piece(piece: Piece) -> str:
    if isinstance(piece, Strong):
        words = escaped(piece.text)
        return words and f"**{words.strip()}**" + " " * words.endswith(" ")
    if isinstance(piece, Code) and not re.search(r"[`|\n]", piece.text):
        return f"`{piece.text}`"
    return escaped(piece.text if isinstance(piece, Code) else piece)


def escaped(text: str) -> str:
    """Plain text in one line: what Markdown or HTML would take for a mark stays itself."""
    return re.sub(r"([\\`*_{}\[\]<>|~#&$])", r"\\\1", re.sub(r"\s+", " ", text))


def write_markdown(document: Document, folder: Path) -> Path:
    """Write ``report.md`` and its files.

    Returns:
        The path of the text.
    """
    text, files = markdown(document)
    shutil.rmtree(folder / FILES, ignore_errors=True)
    (folder / FILES).mkdir(parents=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    path = folder / "report.md"
    write_text(path, text)
    return path
