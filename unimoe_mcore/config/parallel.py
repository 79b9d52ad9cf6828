"""How the processes of a run are laid out."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass
class ParallelConfig:
    """The sizes of the process groups; what is left of the world size is data parallelism.

    Attributes:
        tensor: ranks that share each matrix of the attention and dense layers.
        pipeline: stages that the layers are divided into.
        virtual_pipeline: pieces of the model per stage (the interleaved schedule); 1 is none.
        expert: ranks that the experts are divided among; where that is fewer than there are
            data-parallel ranks, groups of them hold the same experts.
        expert_tensor: ranks that share each matrix of an expert.
        context: ranks that share each sequence; more than 1 is refused until there is an
            attention that can do it (Transformer Engine's).
        sequence_parallel: divide activations along the sequence between the tensor ranks;
            Megatron requires it of a mixture of experts with ``tensor`` > 1.
        allow_untested: lay out in a way that is not in ``TESTED``; the log then says what was.
        distributed_optimizer: divide fp32 main weights and Adam's moments among the data-parallel
            ranks, each of which then moves its part and sends it to the others: less memory, the
            same numbers. May differ when a run is continued.
        processes: processes that a local launch starts; under Slurm or torchrun it is not read.
    """

    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int = 1
    expert: int = 1
    expert_tensor: int = 1
    context: int = 1
    sequence_parallel: bool = False
    allow_untested: bool = False
    distributed_optimizer: bool = False
    processes: int = 2


FEATURES = ("tensor", "pipeline", "virtual_pipeline", "expert", "expert_tensor")
"""Sizes that make a layout another kind of layout as soon as they are above 1."""

TESTED: tuple[tuple[str, ...], ...] = (
    (),
    ("expert",),
    ("tensor",),
    ("pipeline",),
    ("pipeline", "virtual_pipeline"),
    ("pipeline", "expert"),
    ("tensor", "expert"),
    ("expert", "expert_tensor"),
    ("tensor", "pipeline"),
    ("tensor", "pipeline", "expert"),
    ("pipeline", "virtual_pipeline", "expert"),
)
"""The layouts that were compared with one process: the sizes above 1 of each, with any number of
data-parallel ranks. ``benchmarks/equalities.py`` does it for all of them: packed and unpacked,
accumulated, with the distributed optimizer, in the stages and dealings of its table
(``docs/results/equalities.md``);
``tests/training/test_layouts.py`` for most of them on every push."""


def features(parallel: ParallelConfig) -> tuple[str, ...]:
    """The sizes above 1 of a layout, in the order of ``FEATURES``."""
    return tuple(name for name in FEATURES if getattr(parallel, name) > 1)


def layout_words(parallel: ParallelConfig) -> str:
    """A layout in a few letters, such as ``TP=2 EP=4``; what is 1 is left out."""
    letters = zip(("TP", "PP", "VPP", "EP", "ETP"), FEATURES, strict=True)
    sizes = [f"{short}={getattr(parallel, name)}" for short, name in letters]
    return " ".join(size for size in sizes if not size.endswith("=1")) or "data parallel"


def tested_layouts() -> list[str]:
    """The tested kinds of layouts in words."""
    return [" x ".join(kind) if kind else "data parallelism alone" for kind in TESTED]


def check_tested(parallel: ParallelConfig) -> list[str]:
    """A sentence if the layout is of a kind that was never compared with one process."""
    kind = features(parallel)
    if parallel.allow_untested or kind in TESTED:
        return []
    return [
        f"the layout {' x '.join(kind)} was never compared with one process (those that were: "
        f"{'; '.join(tested_layouts())}): set parallel.allow_untested=true to use it all the same"
    ]


def lockstep_ranks(parallel: ParallelConfig) -> int:
    """Neighbouring data-parallel ranks that wait for each other in every MoE layer.

    Experts are divided among ``expert * expert_tensor`` consecutive processes, of which every
    ``tensor`` are one data-parallel rank; where neither number divides the other, several groups
    of experts are chained by the ranks that they share.
    """
    return math.lcm(parallel.tensor, parallel.expert * parallel.expert_tensor) // parallel.tensor


def microbatch_multiple(parallel: ParallelConfig) -> int:
    """What the number of micro-batches must be a multiple of: interleaved stages take them in
    groups of as many as there are stages."""
    return parallel.pipeline if parallel.virtual_pipeline > 1 else 1


def check_layout(parallel: ParallelConfig, world_size: int) -> list[str]:
    """Everything that keeps ``parallel`` from being laid out over ``world_size`` processes.

    Returns:
        One sentence per problem; none if the layout is possible.
    """
    sizes = {
        name: getattr(parallel, name)
        for name in ("tensor", "pipeline", "virtual_pipeline", "expert", "expert_tensor", "context")
    }
    problems = [
        f"parallel.{name} is {size}, it must be at least 1"
        for name, size in sizes.items()
        if size < 1
    ]
    if world_size < 1:
        problems.append(f"a run needs at least one process, not {world_size}")
    if problems:
        return problems  # what follows divides by them
    for names in (("tensor", "pipeline", "context"), ("expert", "expert_tensor", "pipeline")):
        problems += _check_divides(sizes, names, world_size)
    if parallel.virtual_pipeline > 1 and parallel.pipeline == 1:
        problems.append(
            f"parallel.virtual_pipeline={parallel.virtual_pipeline} needs parallel.pipeline > 1:"
            " one stage has nothing to interleave with"
        )
    if parallel.context > 1:
        problems.append(
            f"parallel.context={parallel.context} is not possible yet, because packed attention"
            " needs whole sequences: set it to 1"
        )
    if parallel.tensor > 1 and not parallel.sequence_parallel:
        problems.append(
            f"parallel.tensor={parallel.tensor} needs parallel.sequence_parallel=true:"
            " Megatron trains a mixture of experts no other way"
        )
    if parallel.sequence_parallel and parallel.tensor == 1:
        problems.append("parallel.sequence_parallel=true needs parallel.tensor > 1")
    return problems


def _check_divides(sizes: dict[str, int], names: tuple[str, ...], world_size: int) -> list[str]:
    product = 1
    for name in names:
        product *= sizes[name]
    if world_size % product == 0:
        return []
    terms = " x ".join(f"parallel.{name}={sizes[name]}" for name in names)
    return [f"{terms} makes groups of {product}, which do not divide {world_size} processes"]
