"""One process of ``run_distributed`` in which Transformer Engine seems to be there, and a GPU.

Call with ``prepare=False``: Megatron asks for Transformer Engine when it is imported.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from unimoe_mcore.runtime import capabilities
from unimoe_mcore.runtime.capabilities import Choice
from unimoe_mcore.runtime.devices import prepare_device


def compared(folder: str) -> dict[str, Any]:
    """``tests.model.cases_transformer_engine`` with the stand-in, on the CPU."""
    sys.path.insert(0, str(Path(__file__).parent / "stand_in"))
    here, yes = capabilities.look(), Choice(True, "of the tests")
    chosen = capabilities.choose(replace(here, cuda=yes, transformer_engine=yes))
    on_cpu = replace(
        capabilities.choose(here),
        transformer_engine=chosen.transformer_engine,
        attention=chosen.attention,
        grouped_gemm=chosen.grouped_gemm,
    )
    capabilities.choose = lambda machine: on_cpu
    prepare_device()
    from tests.model.cases_transformer_engine import all_cases

    return all_cases(Path(folder), capabilities.transformer_flags(chosen))
