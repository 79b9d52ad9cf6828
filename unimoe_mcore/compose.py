"""``python -m unimoe_mcore.compose RECIPE [overrides]``: check a recipe, make its run directory.

Prints the path of the resolved recipe, which every process of the run then reads.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data_pipeline.errors import DataError
from unimoe_mcore.config.composition import compose_recipe, dump, load
from unimoe_mcore.config.errors import UserError
from unimoe_mcore.config.recipe import Recipe
from unimoe_mcore.runtime.run_directory import RunDirectory

FREE = (
    "logging",
    "parallel",
    "paths",
    "trainer.checkpoint_every",
    "trainer.keep",
    "trainer.log_every",
    "trainer.threads",
)
"""Settings that a run may change when it is continued: they do not change what is computed."""


def prepare_run(recipe: Recipe) -> Path:
    """Write ``runs/<name>/config.yaml``; return its path.

    Raises:
        UserError: if the run has checkpoints that were made with other settings.
    """
    run = RunDirectory(Path(recipe.paths.runs) / recipe.name)
    if run.config.is_file() and (any(run.checkpoints.glob("step-*")) or run.gives.is_dir()):
        changed = list(_changes(asdict(load(run.config)), asdict(recipe), ""))
        if changed:
            raise UserError(
                f"{run.path} was started with other settings ({'; '.join(changed)}): give this "
                f"run another name (name=...) or delete that folder."
            )
    run.path.mkdir(parents=True, exist_ok=True)
    partial = run.config.with_name(".config.yaml.partial")
    partial.write_text(dump(recipe), encoding="utf8")
    partial.replace(run.config)
    return run.config


def _changes(old: dict[str, Any], new: dict[str, Any], prefix: str) -> Any:
    for key in sorted({*old, *new}):
        path = prefix + key
        if path in FREE:
            continue
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            yield from _changes(before, after, f"{path}.")
        elif before != after:
            yield f"{path} {before} -> {after}"


def speak(main: Callable[[Sequence[str]], int]) -> int:
    """Run an entry point; errors that a user can mend become one sentence and exit code 2."""
    try:
        return main(sys.argv[1:])
    except (UserError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def main(arguments: Sequence[str]) -> int:
    """Compose, validate, write, print."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if arguments else 2
    print(prepare_run(compose_recipe(arguments[0], arguments[1:])))
    return 0


if __name__ == "__main__":
    sys.exit(speak(main))
