"""What a report is made of, whichever form it is written in.

All text is plain: whoever writes a form escapes it. ``Strong`` and ``Code`` mark a whole piece.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from data_pipeline.reading.preview import Preview


@dataclass(frozen=True)
class Strong:
    """Text that stands out."""

    text: str


@dataclass(frozen=True)
class Code:
    """A name as it is typed."""

    text: str


Piece = str | Strong | Code
Text = Piece | Sequence[Piece]


def pieces(text: Text) -> Sequence[Piece]:
    """A text as its pieces."""
    return [text] if isinstance(text, str | Strong | Code) else text


@dataclass(frozen=True)
class Heading:
    """The beginning of a section; level 1 is the report's own title."""

    level: int
    text: str


@dataclass(frozen=True)
class Paragraph:
    """One paragraph."""

    text: Text


@dataclass(frozen=True)
class Bullets:
    """A list."""

    items: Sequence[Text]


@dataclass(frozen=True)
class Table:
    """A table; its first ``words`` columns hold words, the others numbers.

    Attributes:
        head: names of the columns.
        rows: as many cells each as ``head``.
        words: number of columns that stand on the left.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[Text]]
    words: int = 1


@dataclass(frozen=True)
class Panel:
    """One picture of a figure.

    Attributes:
        name: a file's, without ending; several pictures may have the same.
        svg: the picture, from ``<svg`` on.
        words: what it shows, for those who cannot see it.
    """

    name: str
    svg: str
    words: str


@dataclass(frozen=True)
class Figure:
    """Small pictures side by side, as many as there is room for."""

    panels: Sequence[Panel]


@dataclass(frozen=True)
class Answer:
    """What a run says to a question."""

    run: str
    said: str
    exact: bool


@dataclass(frozen=True)
class Example:
    """A question with its media, its right answer and what the runs say.

    Attributes:
        name: ``dataset/key``.
        notes: why a medium is not shown.
    """

    name: str
    question: str
    right: str
    answers: Sequence[Answer]
    media: Sequence[Preview] = ()
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Examples:
    """Some of them."""

    items: Sequence[Example]


@dataclass(frozen=True)
class Listing:
    """Text in its own lines, such as a file."""

    text: str


@dataclass(frozen=True)
class Folded:
    """Blocks that are hidden until they are asked for."""

    summary: str
    blocks: Sequence[Block] = field(default_factory=list)


Block = Heading | Paragraph | Bullets | Table | Figure | Examples | Listing | Folded


@dataclass(frozen=True)
class Document:
    """A whole report; its first block is a heading of level 1."""

    blocks: Sequence[Block]

    @property
    def title(self) -> str:
        """The text of the first heading."""
        return next((block.text for block in self.blocks if isinstance(block, Heading)), "Report")
