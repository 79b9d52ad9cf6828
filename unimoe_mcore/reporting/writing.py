"""From run directories to the files of a report."""

from __future__ import annotations

from pathlib import Path

from unimoe_mcore.reporting.markdown import write_markdown
from unimoe_mcore.reporting.page import write_page
from unimoe_mcore.reporting.results import Results
from unimoe_mcore.reporting.sections import document


def write_report(results: Results, folder: Path) -> tuple[Path, Path]:
    """Write ``report.html`` and ``report.md``.

    Returns:
        Their paths.
    """
    report = document(results)
    folder.mkdir(parents=True, exist_ok=True)
    return write_page(report, folder), write_markdown(report, folder)
