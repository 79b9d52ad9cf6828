"""``python -m unimoe_mcore.compose RECIPE [overrides]``: check a recipe, make its run directory.

Prints the path of the resolved recipe, which every process of the run then reads, and before it,
on standard error, how large its language model is: also where what the run stands on is missing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data_pipeline.opening import open_checked
from unimoe_mcore.checkpoints.artefact import read_manifest
from unimoe_mcore.checkpoints.files import write_text
from unimoe_mcore.checkpoints.sources import find_sources
from unimoe_mcore.checkpoints.starting import find_start
from unimoe_mcore.checkpoints.training import CheckpointFolder, read_state
from unimoe_mcore.config.composition import compose_recipe, dump, load_past
from unimoe_mcore.config.errors import UserError
from unimoe_mcore.config.recipe import Recipe
from unimoe_mcore.config.trainer import CHANGEABLE
from unimoe_mcore.model.size import language_size
from unimoe_mcore.runtime.failure import INTERRUPTED, WRONG_INPUT, sentence
from unimoe_mcore.runtime.mirror_packages import check_mirrors
from unimoe_mcore.runtime.run_directory import RunDirectory, given

FREE = (
    # The data plan, which is compared by itself, has what was really drawn.
    "data.folder",
    "data.missing",
    # How samples are dealt and read is no part of the plan.
    "data.cache_bytes",
    "data.costs",
    "data.deal",
    "data.pad_to",
    "data.prefetch",
    "data.quarantine_most",
    "data.sample_seconds",
    "data.tokens_per_microbatch",
    "data.workers",
    "logging",
    "parallel",
    "paths",
    "trainer.checkpoint_every",
    "trainer.evaluation",
    "trainer.keep",
    "trainer.keep_every",
    "trainer.log_every",
    "trainer.resume_changes",
    "trainer.threads",
    "trainer.validation.every",
    "trainer.validation.most",
    "trainer.validation.split",
)
"""Settings that a run may change when it is continued: they do not change what is computed."""

DECLARED = "data.changes"
"""What a run that is under way may be continued with: the data plan checks it by itself."""


def prepare_run(recipe: Recipe) -> Path:
    """Check what the run needs, write ``runs/<name>/config.yaml``, return its path.

    What an earlier start under other settings left before its first checkpoint is removed.

    Raises:
        UserError: if the run has checkpoints that were made with other settings, is being
            trained, or lacks a part or base to stand on, or the package of a mirror.
        DataError: if the data are missing or damaged.
    """
    check_mirrors(recipe.logging)
    sources = find_sources(recipe)
    open_checked(recipe.data.folder, Path(recipe.paths.cache))
    run = RunDirectory(Path(recipe.paths.runs) / recipe.name)
    with run.lock():
        changed = (
            dict(_changes(asdict(load_past(run.config)), asdict(recipe), ""))
            if (run.config.is_file())
            else {}
        )
        if not given(run):
            changed = {k: v for k, v in changed.items() if not k.startswith(DECLARED)}
        if run.started:
            _check_allowed(recipe, run, changed)
        else:
            find_start(recipe, sources)
        if changed and run.started:
            run.event("settings changed", changes=list(changed.values()))
        elif changed:
            run.forget()
        write_text(run.config, dump(recipe))
    return run.config


def _check_allowed(recipe: Recipe, run: RunDirectory, changed: dict[str, str]) -> None:
    """Refuse settings that a run with checkpoints cannot be continued with.

    Raises:
        UserError: with every difference, and how it can be allowed if it can.
    """
    allowed = {f"trainer.{name}" for name in recipe.trainer.resume_changes}
    refused = {k: v for k, v in changed.items() if k not in allowed}
    if refused:
        names = [key.removeprefix("trainer.") for key in refused]
        cure = f"give this run another name (name={recipe.name}-2) or delete that folder"
        if all(f"trainer.{name}" in refused and name in CHANGEABLE for name in names):
            cure += f", or allow the change by trainer.resume_changes=[{','.join(names)}]"
        raise UserError(
            f"{run.path} was started with other settings ({'; '.join(refused.values())}): {cure}."
        )
    steps, finished = recipe.trainer.steps, CheckpointFolder(run.checkpoints, keep=1).finished()
    done = read_state(finished[0]).step if finished else 0
    if steps < done:
        raise UserError(
            f"{run.path} has done {done} steps already, they cannot be undone by trainer.steps="
            f"{steps}: give this run another name (name={recipe.name}-2)."
        )
    if changed and given(run, steps):
        raise UserError(
            f"{run.path} is done, {'; '.join(changed.values())} would change nothing: let it take "
            f"more steps (trainer.steps=..., trainer.resume_changes=[steps,...])."
        )


def up_to_date(recipe: Recipe, data: str) -> bool:
    """Whether a run is done: it has been judged and has given, from what it would now take.

    Args:
        data: digest of the data.

    Raises:
        UserError: if it is done, but from other settings, sources or data.
    """
    run = RunDirectory(Path(recipe.paths.runs) / recipe.name)
    split = recipe.trainer.evaluation.split
    if not given(run) or not run.evaluation("after", split).is_file():
        return False
    prepare_run(recipe)
    made = read_manifest(run.gives, str(run.gives))
    if not given(run, recipe.trainer.steps):
        return False  # it has been allowed more steps
    if (made.sources, made.data) != (find_sources(recipe).hashes, data):
        raise UserError(
            f"{run.path} was made from another base, earlier run or data than there are now: "
            f"delete that folder to train it again."
        )
    return True


def _changes(old: dict[str, Any], new: dict[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
    """Name of every setting that differs, and how."""
    for key in sorted({*old, *new}):
        path = prefix + key
        if path in FREE:
            continue
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            yield from _changes(before, after, f"{path}.")
        elif before != after:
            yield path, f"{path} {before} -> {after}"


def speak(main: Callable[[Sequence[str]], int]) -> int:
    """Run an entry point; errors that a user can mend become one sentence and exit code 2."""
    try:
        return main(sys.argv[1:])
    except KeyboardInterrupt:
        print("stopped; the same command continues", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        words = sentence(error)
        if not words:
            raise
        print(f"error: {words}", file=sys.stderr, flush=True)
        return WRONG_INPUT


def main(arguments: Sequence[str]) -> int:
    """Compose, validate, write, print."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if arguments else 2
    recipe = compose_recipe(arguments[0], arguments[1:])
    print(f"{recipe.name}: {language_size(recipe).words()}", file=sys.stderr)
    print(prepare_run(recipe))
    return 0


if __name__ == "__main__":
    sys.exit(speak(main))
