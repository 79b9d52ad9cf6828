"""How the processes of a run are laid out."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class ParallelConfig:
    """The sizes of the process groups; what is left of the world size is data parallelism.

    Attributes:
        tensor: ranks that share each matrix of the attention and dense layers.
        pipeline: stages that the layers are divided into.
        virtual_pipeline: pieces of the model per stage (the interleaved schedule); 1 is none,
            and more are refused until evaluation runs under that schedule.
        expert: ranks that the experts are divided among.
        expert_tensor: ranks that share each matrix of an expert.
        context: ranks that share each sequence; more than 1 is refused until there is an
            attention that can do it (Transformer Engine's).
        sequence_parallel: divide activations along the sequence between the tensor ranks;
            Megatron requires it of a mixture of experts with ``tensor`` > 1.
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
    distributed_optimizer: bool = False
    processes: int = 2


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
    if parallel.virtual_pipeline > 1:
        problems.append(
            f"parallel.virtual_pipeline={parallel.virtual_pipeline} is not possible yet, because"
            " evaluation does not run under the interleaved schedule: set it to 1"
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
