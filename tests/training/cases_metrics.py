"""Runs inside the processes of ``run_distributed``: what a step is said to cost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from data_pipeline.reading.collate import MicroBatch
from tests.training.cases_stages import composed, opened
from unimoe_mcore.model.build import expert_count
from unimoe_mcore.model.connectors.learned_query import QueryConnector
from unimoe_mcore.model.operations import Rows, language_operations
from unimoe_mcore.runtime import groups
from unimoe_mcore.training.step import train_step


def computed_rows(batch: MicroBatch) -> Rows:
    """What our attention computes on a CPU: padding as well, and every pair of a padded batch."""
    sequences = len(batch.cu_seqlens) - 1
    pairs = sequences * batch.max_seqlen**2
    return Rows(batch.input_ids.shape[1], pairs, batch.label_tokens)


def counted(folder: str, cases: dict[str, list[str]]) -> dict[str, Any]:
    """Operations of one step by our formula and by PyTorch's counter."""
    results = {}
    for name, (recipe_name, *extra) in cases.items():
        stage = opened(composed(folder, recipe_name, "name=counted", *extra))
        recipe, module = stage.recipe, stage.module
        with stage.pool(stage.samples) as pool, pytest.MonkeyPatch.context() as patch:
            # The queries' batch is padded to its longest medium.
            real = QueryConnector.operations
            patch.setattr(
                QueryConnector,
                "operations",
                lambda self, lengths, real=real: real(
                    self, [max(lengths, default=0)] * len(lengths)
                ),
            )
            batches = stage.feed(pool).read(0)
            train_step(module, batches, 1e-3)  # features are in the cache from here on
            before = sum(tower.operations() for tower in module.towers())
            with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
                train_step(module, batches, 1e-3)
            towers = sum(tower.operations() for tower in module.towers()) - before
        each = [computed_rows(batch) for batch in batches]
        rows = Rows(*(sum(getattr(r, f) for r in each) for f in ("tokens", "pairs", "places")))
        language = language_operations(
            recipe.model, expert_count(recipe), recipe.stage.train, recipe.stage.lora, rows
        )
        results[name] = {
            "formula": language.total + towers,
            "counter": counter.get_total_flops(),
            "towers": towers,
            "by": {str(k): v for k, v in counter.get_flop_counts().get("Global", {}).items()},
        }
        dist.barrier()
        groups.destroy(keep_world=True)
    return results
