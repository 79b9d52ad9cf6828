"""Runs inside the processes of ``run_distributed``: what a step is said to cost."""

from __future__ import annotations

import contextlib
import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from data_pipeline.reading.collate import MicroBatch
from tests.model.cases_empty import as_before, recomputations
from tests.training.cases_stages import composed, opened, run_stage
from unimoe_mcore.model.build import expert_count
from unimoe_mcore.model.connectors.learned_query import QueryConnector
from unimoe_mcore.model.operations import Rows, language_operations
from unimoe_mcore.runtime import collectives, groups
from unimoe_mcore.runtime.run_directory import read_lines
from unimoe_mcore.training.step import train_step


def product_added(buffer: Any, one: Any, other: Any, **_: Any) -> int:
    """Operations of ``buffer`` [m, n] += ``one`` [m, k] times ``other`` [k, n], given shapes."""
    return int(2 * one[0] * one[1] * other[1])


def computed_rows(batch: MicroBatch) -> Rows:
    """What our attention computes on a CPU: padding as well, and every pair of a padded batch."""
    sequences = len(batch.cu_seqlens) - 1
    pairs = sequences * batch.max_seqlen**2
    return Rows(batch.input_ids.shape[1], pairs, batch.label_tokens)


def counted(folder: str, cases: dict[str, list[str]]) -> dict[str, Any]:
    """Operations of one step on all ranks by our formula and by PyTorch's counter."""
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
            train_step(module, batches, 0)  # features are in the cache from here on
            before = sum(tower.operations() for tower in module.towers())
            # PyTorch's counter lacks products that are added to a buffer.
            added: Any = {torch.ops.aten.addmm_: product_added}
            counter = FlopCounterMode(display=False, custom_mapping=added)
            with sdpa_kernel(SDPBackend.MATH), counter:
                train_step(module, batches, 0)
            towers = sum(tower.operations() for tower in module.towers()) - before
        each = [computed_rows(batch) for batch in batches]
        rows = Rows(*(sum(getattr(r, f) for r in each) for f in ("tokens", "pairs", "places")))
        language = language_operations(
            recipe.model, expert_count(recipe), recipe.stage.train, recipe.stage.lora, rows
        )
        # Experts work for all ranks' tokens: only the sums are equal.
        sums = torch.tensor([language.total, towers, counter.get_total_flops()])
        dist.all_reduce(sums)
        results[name] = dict(zip(("language", "towers", "counter"), sums.tolist(), strict=True))
        groups.destroy(keep_world=True)
    return results


def traced(folder: str) -> dict[str, Any]:
    """A whole run with two of its steps traced on all ranks, and every block computed twice."""
    recipe = composed(
        folder,
        "stage3",
        "name=traced",
        "trainer.profile.steps=[2,3]",
        "trainer.profile.ranks=all",
        "trainer.recompute=full",
    )
    stage = opened(recipe)
    sizes = [(p.numel(), p.requires_grad) for c in stage.module.chunks for p in c.parameters()]
    dist.barrier()
    groups.destroy(keep_world=True)
    lines = run_stage(recipe)
    run = Path(recipe.paths.runs) / "traced"
    stem = run / "profile" / f"steps-2-3.rank-{dist.get_rank():05d}"
    with gzip.open(f"{stem}.json.gz", "rt", encoding="utf8") as file:
        names = [event.get("name", "") for event in json.load(file)["traceEvents"]]
    return {
        "lines": lines,
        "held": [sum(n for n, _ in sizes), sum(n for n, trained in sizes if trained)],
        "files": sorted(path.name for path in stem.parent.iterdir()),
        "optimizers": names.count("Optimizer.step#FusedAdam.step"),
        "recomputed": names.count("CheckpointFunctionBackward"),
        "table": Path(f"{stem}.txt").read_text(encoding="utf8"),
        "start": next(e for e in read_lines(run / "events.jsonl") if e["event"] == "start"),
    }


class _Second:
    """An event of a clock on which every collective takes a second."""

    now = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = _Second.now
        _Second.now += 1.0

    def elapsed_time(self, later: _Second) -> float:
        return 1e3 * (later.at - self.at)


def clocked() -> dict[str, float]:
    """Collectives counted by the stopwatch, by what was called."""
    value = torch.ones(2)

    def asynchronous() -> None:
        dist.all_reduce(value, async_op=True).wait()

    def failing() -> None:
        with contextlib.suppress(ValueError, RuntimeError, TypeError):
            dist.all_reduce("no tensor")

    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "Event", _Second)
        for name, call in {
            "one": lambda: dist.all_reduce(value),
            "started and waited for": asynchronous,
            "made of others": lambda: dist.all_gather_object([None] * 2, "x"),
            "failed": failing,
            "none": lambda: value.sum(),
        }.items():
            collectives.start_clock()
            call()
            found[name] = collectives.stop_clock()
        dist.all_reduce(value)
        found["stopped"] = float(len(collectives._spans))
    return found


def everything(
    folder: str, counting: dict[str, Any], recomputing: dict[str, Any], empty: dict[str, Any]
) -> Any:
    """All of the above in one launch."""
    return {
        "traced": traced(folder),
        "clocked": clocked(),
        "counted": counted(folder, counting),
        "recomputed": recomputations(folder, recomputing),
        "empty": as_before(folder, empty),
    }
