"""``python -m unimoe_mcore.launch RECIPE [overrides]``: run a stage with local processes.

Composes and checks the recipe first, then starts ``parallel.processes`` processes of
``unimoe_mcore.train`` under torchrun's elastic agent. Clusters use ``slurm/`` instead, which starts
``unimoe_mcore.node`` on every machine.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.reading.remote import open_set
from unimoe_mcore.compose import prepare_run, speak, up_to_date
from unimoe_mcore.config.composition import compose_recipe
from unimoe_mcore.config.recipe import Recipe
from unimoe_mcore.runtime.failure import INTERRUPTED, WRONG_CODE, WRONG_INPUT
from unimoe_mcore.runtime.parent import DIE_WITH_PARENT


@dataclass(frozen=True)
class Place:
    """Which of a run's processes are started here.

    Attributes:
        processes: on this machine, and on every other one.
        nodes: machines.
        node: number of this machine, from 0.
        head: ``host:port`` at which machine 0 is reached; not needed where it is the only one.
    """

    processes: int
    nodes: int = 1
    node: int = 0
    head: str = ""


def launch(recipe: Recipe) -> int:
    """Train a composed recipe with ``parallel.processes`` local processes; returns as ``start``."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, recipe.trainer.threads)))
    return start(prepare_run(recipe), Place(recipe.parallel.processes))


def start(config: Path, place: Place) -> int:
    """Run this machine's processes of a run to their end.

    Args:
        config: the resolved recipe.
        place: which processes.

    Returns:
        As ``run_processes``.
    """
    continues = "the same command continues from the newest checkpoint"
    return run_processes(["unimoe_mcore.train", str(config)], place, config.parent.name, continues)


def run_processes(command: Sequence[str], place: Place, run: str, again: str) -> int:
    """Run this machine's processes of a command to their end, under torchrun's elastic agent.

    Args:
        command: a module and its arguments.
        place: which processes.
        run: name of the run, for messages.
        again: what the user can do when it was stopped.

    Returns:
        0; 2 if a process refused, 1 if it failed (it has said why); 130 if it was stopped.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # The failed process has already said what went wrong; the agent's own report hides it. Each of
    # its files has a logger with a level of its own.
    for name in list(logging.root.manager.loggerDict):
        if name.startswith(("torch.distributed.elastic", "torch.distributed.launcher")):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    agent = LaunchConfig(
        min_nodes=place.nodes,
        max_nodes=place.nodes,
        nproc_per_node=place.processes,
        run_id=run,
        rdzv_backend="static" if place.head else "c10d",
        rdzv_endpoint=place.head or "localhost:0",
        rdzv_configs={"rank": place.node} if place.head else {},
        max_restarts=0,
        monitor_interval=0.2,
    )
    os.environ[DIE_WITH_PARENT] = str(os.getpid())
    try:
        elastic_launch(agent, sys.executable)("-m", *command)
    except ChildFailedError as error:
        return _exit_code(run, [failure.exitcode for failure in error.failures.values()], again)
    except SignalException:
        print(f"{run}: stopped; {again}", file=sys.stderr)
        return INTERRUPTED
    finally:
        del os.environ[DIE_WITH_PARENT]
    return 0


def _exit_code(run: str, codes: Sequence[int], again: str) -> int:
    """2 if a process refused, else 1; says what processes cannot say that were killed."""
    if WRONG_INPUT in codes:
        return WRONG_INPUT
    killed = {-code for code in codes if code < 0} - {signal.SIGTERM}  # that was the agent
    for number in sorted(killed):
        print(f"error: a process of {run} was killed by signal {number}; {again}.", file=sys.stderr)
    return WRONG_CODE


def main(arguments: Sequence[str]) -> int:
    """Compose, check, run, unless that is done."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if arguments else 2
    recipe = compose_recipe(arguments[0], arguments[1:])
    data = open_set(recipe.data.folder, Path(recipe.paths.cache))
    if up_to_date(recipe, data.digest):
        print(f"{recipe.name}: done before")
        return 0
    return launch(recipe)


if __name__ == "__main__":
    sys.exit(speak(main))
