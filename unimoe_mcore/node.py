"""``python -m unimoe_mcore.node CONFIG ...``: one machine's processes of a run over several.

To be started once on every machine, with the resolved recipe that ``python -m
unimoe_mcore.compose`` wrote (``slurm/lib/run.sh`` does both).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from unimoe_mcore.compose import speak
from unimoe_mcore.launch import Place, start
from unimoe_mcore.runtime.failure import WRONG_CODE, WRONG_INPUT


def main(arguments: Sequence[str]) -> int:
    """Start the processes and wait for them.

    Returns:
        As ``launch.start``, but 1 if it was ended by a signal: srun ends the other nodes when one
        has failed, and returns the highest code of all.
    """
    parser = argparse.ArgumentParser("python -m unimoe_mcore.node", description=__doc__)
    parser.add_argument("config", type=Path, help="the resolved recipe, runs/<name>/config.yaml")
    parser.add_argument("--processes", type=int, required=True, help="on each machine")
    parser.add_argument("--nodes", type=int, required=True, help="number of machines")
    parser.add_argument("--node", type=int, required=True, help="number of this one, from 0")
    parser.add_argument("--head", required=True, help="host:port at which number 0 is reached")
    given = parser.parse_args(arguments)
    code = start(given.config, Place(given.processes, given.nodes, given.node, given.head))
    return WRONG_CODE if code > WRONG_INPUT else code


if __name__ == "__main__":
    sys.exit(speak(main))
