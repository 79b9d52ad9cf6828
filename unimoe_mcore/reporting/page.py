"""A report as one HTML file that needs nothing else: no network, no script."""

from __future__ import annotations

import base64
import re
from functools import cache
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from data_pipeline.reading.preview import Preview
from unimoe_mcore.checkpoints.files import write_text
from unimoe_mcore.reporting.document import Code, Document, Heading, Strong, pieces

NAME = "page.html.jinja"


def page(document: Document) -> str:
    """The HTML. Every text is escaped by the template's engine."""
    sections = [
        block for block in document.blocks if isinstance(block, Heading) and block.level == 2
    ]
    return _template().render(document=document, sections=sections)


@cache
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("unimoe_mcore.reporting", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {
        "pieces": pieces,
        "kind": lambda thing: type(thing).__name__,
        "is_strong": lambda piece: isinstance(piece, Strong),
        "is_code": lambda piece: isinstance(piece, Code),
        "address": _address,
        "anchor": lambda text: re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-"),
        "drawing": Markup,  # of panels only: matplotlib has escaped their texts
    }
    return environment.get_template(NAME)


def _address(medium: Preview) -> str:
    """A medium's bytes as an address."""
    return f"data:{medium.mime};base64,{base64.b64encode(medium.data).decode()}"


def write_page(document: Document, folder: Path) -> Path:
    """Write ``report.html``.

    Returns:
        Its path.
    """
    path = folder / "report.html"
    write_text(path, page(document))
    return path
