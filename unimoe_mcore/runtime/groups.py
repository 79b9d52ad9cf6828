"""Process groups and random seeds: the one place where Megatron's global state is set."""

from __future__ import annotations

import gc
import os
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed

from unimoe_mcore.config.errors import UserError
from unimoe_mcore.config.parallel import ParallelConfig, check_layout
from unimoe_mcore.runtime.devices import backend, prepare_device

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection


# During set-up one rank reads and checks every byte of the data while the others wait in a barrier:
# with big data that takes longer than the usual ten minutes. A rank that died is noticed by the
# launcher, not by this.
SETUP_TIMEOUT = timedelta(hours=1)
"""How long a collective waits for a rank that does not come."""


class LayoutError(UserError):
    """The processes there are cannot be laid out as the recipe says."""


def initialise(
    parallel: ParallelConfig, seed: int = 1234, timeout: timedelta = SETUP_TIMEOUT
) -> ProcessGroupCollection:
    """Set up ``torch.distributed``, Megatron's process groups and the seeds of every rank.

    Ranks and addresses come from torchrun's environment (``RANK``, ``WORLD_SIZE``,
    ``MASTER_ADDR``, ``MASTER_PORT``); without it the run is of one process.

    Args:
        parallel: the layout.
        seed: seeds torch and Megatron's RNG tracker. Ranks that hold the same weights draw the
            same numbers; pipeline stages, tensor and expert ranks differ, by Megatron's rules.
        timeout: how long a collective waits for a rank that does not come.

    Returns:
        The process groups that this rank belongs to, for modules that take them as an object.

    Raises:
        LayoutError: with every problem of the layout, before anything is set up.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    problems = check_layout(parallel, world_size)
    if problems:
        raise LayoutError("; ".join(problems))

    prepare_device()
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection

    if torch.distributed.is_initialized():
        # Models are rings of references, and hold the groups of their layout (see ``destroy``).
        gc.collect()
    else:
        _join(timeout)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=(
            parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None
        ),
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor,
        distributed_timeout_minutes=max(1, round(timeout.total_seconds() / 60)),
    )
    set_seed(seed)
    return ProcessGroupCollection.use_mpu_process_groups()


def set_seed(seed: int) -> None:
    """Seed torch and Megatron's RNG tracker on this rank; needs the process groups.

    On the CPU, host and "device" randomness are one generator: whatever draws from it differently
    on different ranks must have a ``torch.Generator`` of its own.
    """
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    stage_seed = seed + 100 * parallel_state.get_pipeline_model_parallel_rank()
    torch.manual_seed(stage_seed)
    model_parallel_cuda_manual_seed(stage_seed, force_reset_rng=True)


def layout_flags(parallel: ParallelConfig) -> dict[str, Any]:
    """The fields of Megatron's ``TransformerConfig`` that repeat the layout."""
    interleaved = parallel.virtual_pipeline > 1
    return {
        "tensor_model_parallel_size": parallel.tensor,
        "pipeline_model_parallel_size": parallel.pipeline,
        "virtual_pipeline_model_parallel_size": parallel.virtual_pipeline if interleaved else None,
        "context_parallel_size": parallel.context,
        "expert_model_parallel_size": parallel.expert,
        "expert_tensor_parallel_size": parallel.expert_tensor,
        "sequence_parallel": parallel.sequence_parallel,
        # Two interleaved stages exchange their messages in the wrong order when they are batched
        # (p2p_communication.py:17): no error, other losses.
        "batch_p2p_comm": not interleaved,
    }


def destroy(keep_world: bool = False) -> None:
    """Forget Megatron's process groups and leave ``torch.distributed``; nothing if not set up.

    Args:
        keep_world: stay in ``torch.distributed``, so that another layout can follow; a collective.
    """
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    if not torch.distributed.is_initialized():
        return
    if keep_world:
        _close_all_but_world()
    else:
        torch.distributed.destroy_process_group()


def _close_all_but_world() -> None:
    """Close all groups but the world's; a collective. Megatron only forgets those that it made.

    Every gloo group has three threads, of which one is never quite asleep: a few hundred groups of
    past layouts take all of a machine's time.
    """
    world = torch.distributed.group.WORLD
    torch.distributed.barrier()  # a rank that leaves while another still talks ends both
    for group in list(torch.distributed.distributed_c10d._world.pg_map):
        if group is not world:
            torch.distributed.destroy_process_group(group)


def _join(timeout: timedelta) -> None:
    if "WORLD_SIZE" in os.environ:
        torch.distributed.init_process_group(backend(), timeout=timeout)
        return
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group(
        backend(), timeout=timeout, store=store, rank=0, world_size=1
    )
