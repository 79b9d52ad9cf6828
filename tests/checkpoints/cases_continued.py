"""Runs inside the processes of ``run_distributed``: one stage-1 run after the other."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist

from tests.training import cases_data


def runs(folder: str, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """``cases_data.run`` for every case, and steps and hash of what it gave.

    The last checkpoint of ``first`` after four steps is kept as ``runs/first-4``.
    """
    found = []
    for case in cases:
        run = cases_data.run(folder, **case)
        path = Path(folder) / "runs" / case["name"]
        manifest = path / "gives/manifest.json"
        facts = json.loads(manifest.read_text()) if manifest.is_file() else {}
        found.append({**run, "steps": facts.get("steps"), "hash": facts.get("hash")})
        kept = path.with_name("first-4")
        if dist.is_initialized() and dist.get_rank() == 0 and not kept.exists():
            shutil.copytree(path / "checkpoints/step-00000004", kept)
        dist.barrier()
    return found
