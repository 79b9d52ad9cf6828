"""Runs inside the processes of ``run_distributed``: runs whose data, plan or ranks change."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist

from tests.training.cases_stages import composed, opened
from unimoe_mcore.config.errors import UserError
from unimoe_mcore.runtime import groups
from unimoe_mcore.runtime.run_directory import read_lines


def run(
    folder: str,
    name: str,
    extra: list[str],
    stop: int = 0,
    notes: dict[str, Any] | None = None,
    recipe_name: str = "stage1",
) -> dict[str, Any]:
    """A run, or what is left of it; killed after the checkpoint at ``stop``.

    Args:
        notes: name -> task, dataset, shard, key: what an earlier process left that died there.

    Returns:
        Its metrics so far, the sentence with which it was refused, and what is in quarantine.
    """
    recipe = composed(folder, recipe_name, f"name={name}", "trainer.evaluation.after=false", *extra)
    refused = ""
    path = Path(recipe.paths.runs) / name
    if int(os.environ["RANK"]) == 0:
        for note, sample in (notes or {}).items():
            (path / "reading").mkdir(exist_ok=True)
            text = json.dumps(sample).encode().ljust(4096, b"\n")
            (path / "reading" / note).write_bytes(text + b"Fatal Python error: Aborted\n")
    try:
        stage = opened(recipe)
        if stop:
            save = stage._save

            def save_and_stop(step: int, best: bool = False) -> None:
                save(step, best)
                if step == stop:
                    stage.saver.wait()
                    raise InterruptedError

            stage._save = save_and_stop  # type: ignore[method-assign]
        stage.run()
    except InterruptedError:
        pass
    except UserError as error:
        refused = str(error)
    dist.barrier()
    groups.destroy(keep_world=True)
    quarantine, metrics = path / "quarantine.jsonl", path / "metrics.jsonl"
    answers = path / "evaluation" / "after.test.jsonl"
    return {
        "asked": sorted(line["key"] for line in read_lines(answers)) if answers.is_file() else [],
        "metrics": read_lines(metrics) if metrics.is_file() else [],
        "quarantine": read_lines(quarantine) if quarantine.is_file() else [],
        "refused": refused,
    }


def runs(folder: str, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One run after the other; a case with ``copy`` begins with a copy of another run."""
    found = []
    for case in cases:
        arguments = {k: v for k, v in case.items() if k != "copy"}
        if "copy" in case and dist.get_rank() == 0:
            place = Path(folder) / "runs"
            shutil.copytree(place / case["copy"], place / case["name"])
            config = place / case["name"] / "config.yaml"
            text = config.read_text(encoding="utf8")
            config.write_text(text.replace(f"name: {case['copy']}", f"name: {case['name']}"))
        found.append(run(folder, **arguments))
    return found
