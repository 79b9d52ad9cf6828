"""``python -m unimoe_mcore.report RUN... [--to FOLDER]``: what runs learnt, to read.

RUN is a run's directory, such as ``runs/stage3``; the runs that it stands on are found by
themselves. Several runs stand side by side. Writes ``report.html``, one file that needs nothing
else, and ``report.md`` with its pictures, into FOLDER: without it ``report`` in the run's
directory, or beside the first one's if there are several.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from unimoe_mcore.compose import speak
from unimoe_mcore.config.errors import UserError


def main(arguments: Sequence[str]) -> int:
    """Read the runs, write the report, say where it is."""
    if not arguments or any(argument in ("-h", "--help") for argument in arguments):
        print(__doc__)
        return 0 if arguments else 2
    paths, folder = _parsed(arguments)
    from unimoe_mcore.reporting.results import gather
    from unimoe_mcore.reporting.writing import write_report

    html, text = write_report(gather(paths), folder)
    print(f"{html} ({html.stat().st_size / 2**20:.1f} MB, open it in a browser)\n{text}")
    return 0


def _parsed(arguments: Sequence[str]) -> tuple[list[Path], Path]:
    """The runs and the folder that the report goes to.

    Raises:
        UserError: if there is no run, or an option is not known.
    """
    left, runs, folder = list(arguments), list[Path](), None
    while left:
        argument = left.pop(0)
        if argument == "--to" and left:
            folder = Path(left.pop(0))
        elif argument.startswith("-"):
            raise UserError(f"{argument} is no option, or lacks its value: try --help.")
        else:
            runs.append(Path(argument))
    if not runs:
        raise UserError("Name at least one run, such as runs/stage3.")
    if folder is None:
        folder = (runs[0] if len(runs) == 1 else runs[0].parent) / "report"
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is no folder: choose another one with --to FOLDER.")
    return runs, folder


if __name__ == "__main__":
    sys.exit(speak(main))
