"""``generate`` with a model whose second step fails in the first process, as memory may run out."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

from unimoe_mcore import generate, launch
from unimoe_mcore.compose import speak


def _failing(arguments: Sequence[str]) -> int:
    if not generate.joined():
        return generate.main(arguments)
    from unimoe_mcore.runtime.devices import prepare_device

    prepare_device()
    from unimoe_mcore.model.unimoe import UniMoEModel

    step, steps = UniMoEModel.next_logits, []

    def next_logits(self: UniMoEModel, *given: Any) -> Any:
        steps.append(1)
        if generate.is_first() and len(steps) == 2:
            raise ValueError("the second step fails")
        return step(self, *given)

    UniMoEModel.next_logits = next_logits  # type: ignore[method-assign]
    return generate.main(arguments)


def _launched(command: Sequence[str], *rest: Any) -> int:
    return _run([__spec__.name, *command[1:]], *rest)


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    _run, launch.run_processes = launch.run_processes, _launched
    sys.exit(speak(generate.under_torchrun(_failing)))
