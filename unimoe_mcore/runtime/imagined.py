"""A world of many ranks imagined by one process: layouts that no machine at hand has.

Process groups are PyTorch's fake ones: they know who is in them and communicate nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch.distributed

from unimoe_mcore.config.parallel import ParallelConfig
from unimoe_mcore.runtime import groups

PARTITIONS = {
    "TENSOR_MODEL_PARALLEL_GROUP": "tp",
    "PIPELINE_MODEL_PARALLEL_GROUP": "pp",
    "DATA_PARALLEL_GROUP": "dp",
    "DATA_PARALLEL_GROUP_WITH_CP": "dp_cp",
    "CONTEXT_PARALLEL_GROUP": "cp",
    "MODEL_PARALLEL_GROUP": "mp",
    "EXPERT_MODEL_PARALLEL_GROUP": "ep",
    "EXPERT_TENSOR_PARALLEL_GROUP": "expt_tp",
    "EXPERT_TENSOR_AND_MODEL_PARALLEL_GROUP": "tp_ep",
    "EXPERT_DATA_PARALLEL_GROUP": "expt_dp",
}
"""Megatron's name of each kind of group, and that of ``ProcessGroupCollection``. Every rank is in
one group of each kind."""


@dataclass
class ImaginedWorld:
    """A layout of many ranks, as one of them sees it.

    Attributes:
        groups: the rank's process groups.
        made: kind of group (a value of ``PARTITIONS``) -> members of every group of that kind.
    """

    groups: Any = None
    made: dict[str, list[list[int]]] = field(default_factory=dict)


@contextmanager
def imagined(parallel: ParallelConfig, world_size: int, rank: int = 0) -> Iterator[ImaginedWorld]:
    """Lay out ``world_size`` ranks and be one of them.

    Raises:
        LayoutError: the layout is impossible.
    """
    # Registers the backend: nothing but a test or a study of a layout asks for it.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    world = ImaginedWorld()
    original, before = torch.distributed.new_group, os.environ.get("WORLD_SIZE")

    def new_group(ranks: Any = None, *arguments: Any, **keywords: Any) -> Any:
        keywords["backend"] = "fake"  # Megatron also asks for gloo
        kind = PARTITIONS.get(str(keywords.get("group_desc")))
        if kind is not None:
            world.made.setdefault(kind, []).append(list(ranks))
        return original(ranks, *arguments, **keywords)

    torch.distributed.init_process_group(
        "fake", store=FakeStore(), rank=rank, world_size=world_size
    )
    torch.distributed.new_group = new_group
    os.environ["WORLD_SIZE"] = str(world_size)
    try:
        world.groups = groups.initialise(parallel)
        yield world
    finally:
        torch.distributed.new_group = original
        if before is None:
            del os.environ["WORLD_SIZE"]
        else:
            os.environ["WORLD_SIZE"] = before
        groups.destroy()
