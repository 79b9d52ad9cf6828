"""``python -m unimoe_mcore.launch RECIPE [overrides]``: run a stage with local processes.

Composes and checks the recipe first, then starts ``parallel.processes`` processes of
``unimoe_mcore.train`` under torchrun's elastic agent. Clusters use ``slurm/`` instead.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence

from unimoe_mcore.compose import prepare_run, speak
from unimoe_mcore.config.composition import compose_recipe
from unimoe_mcore.config.recipe import Recipe
from unimoe_mcore.runtime.parent import DIE_WITH_PARENT


def launch(recipe: Recipe) -> int:
    """Train a composed recipe with ``parallel.processes`` local processes.

    Returns:
        0; 2 if a process refused, 1 if it failed (it has said why); 130 if it was stopped.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = prepare_run(recipe)
    # The failed process has already said what went wrong; the agent's own report hides it.
    for name in ("torch.distributed.elastic", "torch.distributed.launcher"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, recipe.trainer.threads)))
    os.environ[DIE_WITH_PARENT] = str(os.getpid())
    agent = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=recipe.parallel.processes,
        run_id=recipe.name,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.2,
    )
    try:
        elastic_launch(agent, sys.executable)("-m", "unimoe_mcore.train", str(config))
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        if failure.exitcode < 0:
            print(
                f"error: a process of {recipe.name} was killed by signal {-failure.exitcode}; "
                f"the same command continues from the newest checkpoint.",
                file=sys.stderr,
            )
        return 2 if failure.exitcode == 2 else 1
    except SignalException:
        print(f"{recipe.name}: stopped; the same command continues", file=sys.stderr)
        return 130
    return 0


def main(arguments: Sequence[str]) -> int:
    """Compose, check, run."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if arguments else 2
    return launch(compose_recipe(arguments[0], arguments[1:]))


if __name__ == "__main__":
    sys.exit(speak(main))
