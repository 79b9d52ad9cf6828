"""Layouts over two processes, one after the other."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from unimoe_mcore.config.parallel import ParallelConfig
from unimoe_mcore.runtime.groups import LayoutError, destroy, initialise


def layouts() -> dict[str, Any]:
    """The group sizes and seeds of several layouts, as this rank sees them."""
    from megatron.core.tensor_parallel.random import (
        get_cuda_rng_tracker,
        get_expert_parallel_rng_tracker_name,
    )

    try:
        initialise(ParallelConfig(tensor=2))
        refused = "was not refused"
    except LayoutError as error:
        refused = str(error)
    results: dict[str, Any] = {"refused": refused, "set up by then": dist.is_initialized()}
    for name, parallel in {
        "expert": ParallelConfig(expert=2),
        "tensor": ParallelConfig(tensor=2, sequence_parallel=True),
        "pipeline": ParallelConfig(pipeline=2),
        "data": ParallelConfig(),
    }.items():
        groups = initialise(parallel, seed=5)
        sizes = {key: getattr(groups, key).size() for key in ("tp", "pp", "ep", "dp", "expt_dp")}
        own = torch.rand(1).item()
        with get_cuda_rng_tracker().fork(get_expert_parallel_rng_tracker_name()):
            expert = torch.rand(1).item()
        total = torch.tensor([1.0 + dist.get_rank()])
        dist.all_reduce(total, group=groups.ep)
        results[name] = {"sizes": sizes, "own": own, "expert": expert, "ep sum": total.item()}
        destroy(keep_world=True)
    destroy()
    return results | {"left": not dist.is_initialized()}


def fail_on_one_rank() -> None:
    """Rank 1 fails; rank 0 waits for it and fails because of it."""
    dist.init_process_group("gloo")
    if dist.get_rank() == 1:
        raise ValueError("the culprit")
    dist.barrier()
