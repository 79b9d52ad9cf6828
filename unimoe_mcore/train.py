"""``torchrun -m unimoe_mcore.train``: one run of a stage, on every rank.

Takes the path of a resolved recipe (``python -m unimoe_mcore.compose`` prints it), or a recipe's
name and Hydra overrides, which every rank then composes for itself.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from unimoe_mcore.runtime.parent import die_with_parent

die_with_parent()  # before torch, whose import takes seconds

from unimoe_mcore.runtime.devices import prepare_device  # noqa: E402

prepare_device()  # before anything of Megatron is imported

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from unimoe_mcore.compose import prepare_run  # noqa: E402
from unimoe_mcore.config.composition import compose_recipe, load  # noqa: E402
from unimoe_mcore.config.recipe import Recipe  # noqa: E402
from unimoe_mcore.runtime import groups  # noqa: E402
from unimoe_mcore.runtime.failure import leave  # noqa: E402
from unimoe_mcore.runtime.run_directory import RunDirectory  # noqa: E402
from unimoe_mcore.training.stage import StageRun  # noqa: E402


def main(arguments: Sequence[str]) -> int:
    """Train, evaluate, give."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if arguments else 2
    try:
        _train(_recipe(arguments))
    except (Exception, KeyboardInterrupt) as error:
        leave(error)
    return 0


def _train(recipe: Recipe) -> None:
    run = RunDirectory(Path(recipe.paths.runs) / recipe.name, writes=_rank() == 0)
    held = run.lock(seconds=20) if run.writes else None
    if recipe.trainer.threads:
        torch.set_num_threads(recipe.trainer.threads)
    collection = groups.initialise(recipe.parallel, seed=recipe.trainer.seed)
    StageRun(recipe, run, collection).run()
    dist.barrier()
    groups.destroy()
    if held is not None:
        held.close()


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _recipe(arguments: Sequence[str]) -> Recipe:
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if arguments[0].endswith(".yaml"):
        return load(Path(arguments[0]), world)
    recipe = compose_recipe(arguments[0], arguments[1:], world_size=world)
    if _rank() == 0:
        prepare_run(recipe)
    return recipe


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
