"""Layouts of 8 to 4096 ranks without a cluster: groups, parameters and bytes of every rank.

Every layout is set up by Megatron with fake process groups in this one process; the paper's
language model with eight experts is built without memory on one rank of every pipeline stage, and
Megatron's own optimizer on it. What they hold is compared with the closed form
(``unimoe_mcore.model.memory``) that a run prints at its start.

``--every N`` looks at every Nth layout only.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice, product
from pathlib import Path
from typing import Any

from unimoe_mcore.runtime.devices import prepare_device

prepare_device()

import torch  # noqa: E402
from megatron.core.distributed import (  # noqa: E402
    DistributedDataParallel,
    DistributedDataParallelConfig,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer  # noqa: E402
from megatron.core.transformer.module import Float16Module  # noqa: E402
from torch.overrides import TorchFunctionMode  # noqa: E402

from benchmarks.side_by_side import heading  # noqa: E402
from unimoe_mcore.config.composition import compose_recipe  # noqa: E402
from unimoe_mcore.config.parallel import ParallelConfig, check_layout  # noqa: E402
from unimoe_mcore.config.recipe import Recipe  # noqa: E402
from unimoe_mcore.model.build import build_model, expert_count  # noqa: E402
from unimoe_mcore.model.memory import (  # noqa: E402
    checkpoint_bytes,
    language_parameters,
    rank_memory,
    trained_counts,
)
from unimoe_mcore.model.parts import part_of, train_only  # noqa: E402
from unimoe_mcore.runtime.capabilities import detect, transformer_flags  # noqa: E402
from unimoe_mcore.runtime.imagined import ImaginedWorld, imagined  # noqa: E402

TARGET = Path(__file__).parents[1] / "docs" / "results" / "scale.md"
NODE = 8
"""Devices of a node."""
WORLDS = (8, 64, 512, 4096)
ALL = ["embeddings", "norms", "attention", "mlp", "router", "experts", "lora"]


def paper(experts: int, placement: str = "interval") -> Recipe:
    """Stage 3 of the paper's language model, without towers."""
    recipe = compose_recipe(
        "stage3",
        [
            f"model=unimoe_7b_{experts}e",
            f"model.moe.placement={placement}",
            "experts=identical",
            "parallel.expert=1",
            "trainer.evaluation.routing=false",
        ],
    )
    recipe.model.towers = {}
    recipe.stage.train = ["router", "lora"]
    return recipe


def layouts(world_size: int) -> Iterator[ParallelConfig]:
    """Every possible layout of some ranks with up to eight of a kind."""
    for tensor, pipeline, expert, expert_tensor in product(
        (1, 2, 4, 8), (1, 2, 4, 8), (1, 2, 4, 8), (1, 2)
    ):
        layout = ParallelConfig(
            tensor=tensor,
            pipeline=pipeline,
            expert=expert,
            expert_tensor=expert_tensor,
            sequence_parallel=tensor > 1,
        )
        if not check_layout(layout, world_size):
            yield layout


def group_problems(world: ImaginedWorld, layout: ParallelConfig, world_size: int) -> list[str]:
    """What is wrong with the groups of a layout, a sentence each."""
    problems = []
    rank = torch.distributed.get_rank()
    for kind, groups in world.made.items():
        members = Counter(member for group in groups for member in group)
        if members != Counter(range(world_size)):
            problems.append(f"{kind}: not every rank is in exactly one group")
        mine = getattr(world.groups, kind)
        if sorted(torch.distributed.get_process_group_ranks(mine)) not in map(sorted, groups):
            problems.append(f"{kind}: rank {rank} is in a group that is none of them")
        elif rank not in torch.distributed.get_process_group_ranks(mine):
            problems.append(f"{kind}: rank {rank} is not in its own group")
    sizes = {
        "tp": layout.tensor,
        "pp": layout.pipeline,
        "ep": layout.expert,
        "expt_tp": layout.expert_tensor,
        "dp": world_size // (layout.tensor * layout.pipeline),
        "expt_dp": world_size // (layout.expert * layout.expert_tensor * layout.pipeline),
    }
    for kind, size in sizes.items():
        if {len(group) for group in world.made[kind]} != {size}:
            problems.append(f"{kind}: groups are not of {size}")
    if NODE % (layout.expert * layout.expert_tensor) == 0:
        problems += [
            f"tp_ep: {group} lies across nodes of {NODE}"
            for group in world.made["tp_ep"]
            if len({member // NODE for member in group}) > 1
        ]
    return problems


@dataclass(frozen=True)
class Held:
    """What a rank holds: parameters by part, bytes of gradients and of optimizer state."""

    parts: dict[str, int]
    gradients: int
    optimizer: int


def held(recipe: Recipe, world: ImaginedWorld, distributed: bool) -> Held:
    """What Megatron makes of a recipe on this rank, counted tensor by tensor."""
    flags = transformer_flags(detect())
    model = build_model(recipe, world.groups, {}, torch.bfloat16, flags, memory=False)
    train_only(model, recipe.stage)
    counts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        part = part_of(name)
        counts[part] = counts.get(part, 0) + parameter.numel()
    reduction = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=distributed
    )
    settings = OptimizerConfig(
        optimizer="adam",
        lr=1e-3,
        bf16=True,
        params_dtype=torch.bfloat16,
        use_distributed_optimizer=distributed,
    )
    with _only_shapes():
        wrapped = DistributedDataParallel(
            model.config, reduction, Float16Module(model.config, model)
        )
    with _alone():
        optimizer = get_megatron_optimizer(settings, [wrapped], use_gloo_process_groups=False)
    buffers = [*wrapped.buffers, *wrapped.expert_parallel_buffers]
    main = [p for group in optimizer.param_groups for p in group["params"]]
    if {p.dtype for p in main} - {torch.float32}:
        raise RuntimeError("main weights are not fp32")
    return Held(
        counts,
        sum(b.grad_data.numel() * b.grad_data.element_size() for b in buffers),
        3 * sum(p.numel() * p.element_size() for p in main),  # and Adam's two moments
    )


class _only_shapes(TorchFunctionMode):  # noqa: N801
    """Buffers without memory."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        keywords = dict(kwargs or {})
        if getattr(func, "__name__", "") in ("empty", "zeros", "full", "ones", "tensor"):
            keywords["device"] = torch.device("meta")
        return func(*args, **keywords)


@contextmanager
def _alone() -> Iterator[None]:
    """Answers what an optimizer asks of the other ranks, and of tensors without memory."""
    gather, kind = torch.distributed.all_gather_object, torch.Tensor.type
    names = {torch.bfloat16: "torch.cuda.BFloat16Tensor", torch.float32: "torch.cuda.FloatTensor"}

    def gathered(everyone: list[Any], mine: Any, group: Any = None) -> None:
        everyone[:] = [mine] * len(everyone)

    def type_of(tensor: torch.Tensor, *arguments: Any, **keywords: Any) -> Any:
        if tensor.is_meta and not arguments and not keywords:
            return names[tensor.dtype]
        return kind(tensor, *arguments, **keywords)

    torch.distributed.all_gather_object = gathered  # type: ignore[assignment]
    torch.Tensor.type = type_of  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.distributed.all_gather_object = gather
        torch.Tensor.type = kind  # type: ignore[method-assign]


def differences(recipe: Recipe, world_size: int, stage: int, distributed: bool) -> list[str]:
    """Where a rank of a pipeline stage differs from the closed form, a sentence each."""
    layout = recipe.parallel
    with imagined(layout, world_size, stage * (world_size // layout.pipeline)) as world:
        assert world.groups.pp.rank() == stage
        found = held(recipe, world, distributed)
    counts = language_parameters(
        recipe.model, expert_count(recipe), recipe.stage.lora, layout, stage
    )
    trained = trained_counts(counts, recipe)
    bytes_ = rank_memory(counts, trained, layout, world_size, "bf16", distributed)
    parts: dict[str, int] = {}
    for part, count in counts.items():
        parts[part.split(".")[0]] = parts.get(part.split(".")[0], 0) + count
    problems = []
    if parts != found.parts:
        problems.append(f"stage {stage} has {found.parts}, not {parts}")
    for name in ("gradients", "optimizer"):
        wanted, there = getattr(bytes_, name), getattr(found, name)
        if wanted != there:
            problems.append(f"stage {stage}: {name} take {there} bytes, not {wanted}")
    return problems


def stages(layout: ParallelConfig) -> list[int]:
    """The first, the second and the last pipeline stage: all others are like the second."""
    return sorted({0, min(1, layout.pipeline - 1), layout.pipeline - 1})


def words(layout: ParallelConfig) -> str:
    """A layout in letters."""
    return f"TP={layout.tensor} PP={layout.pipeline} EP={layout.expert} ETP={layout.expert_tensor}"


def study(world_size: int, every: int = 1) -> Iterator[tuple[ParallelConfig, list[str]]]:
    """Layouts of some ranks with what is wrong with each."""
    recipe = paper(8)
    for number, layout in enumerate(islice(layouts(world_size), 0, None, every)):
        recipe.parallel = layout
        with imagined(layout, world_size, (number * 7919) % world_size) as world:
            problems = group_problems(world, layout, world_size)
        recipe.stage.train = ALL if number % 2 else ["router", "lora"]
        distributed = number % 4 >= 2
        if world_size < WORLDS[-1]:  # what a rank holds is compared where it is set up quickly
            for stage in stages(layout):
                problems += differences(recipe, world_size, stage, distributed)
        yield layout, problems


def memory_rows(world_size: int, chosen: Sequence[ParallelConfig]) -> list[str]:
    """A table of the closed form for some layouts: what the fullest rank holds."""
    rows = []
    for layout, train in product(chosen, (["router", "lora"], ALL)):
        recipe = replace(paper(8), parallel=layout)
        recipe.stage.train = train
        cells = []
        for distributed in (False, True):
            fullest = 0
            for stage in range(layout.pipeline):
                counts = language_parameters(recipe.model, 8, recipe.stage.lora, layout, stage)
                trained = trained_counts(counts, recipe)
                memory = rank_memory(counts, trained, layout, world_size, "bf16", distributed)
                fullest = max(fullest, memory.total)
            cells.append(f"{fullest / 1e9:.1f}")
        what = "everything" if train is ALL else "router and adapters"
        rows.append(f"| {words(layout)} | {what} | {' | '.join(cells)} |")
    return rows


def checkpoint_rows() -> list[str]:
    """Size of a stage-3 checkpoint of the paper's models as a share of the model in bf16."""
    rows = []
    for experts, placement in product((4, 8), ("interval", "all")):
        recipe = paper(experts, placement)
        counts = language_parameters(recipe.model, experts, recipe.stage.lora, ParallelConfig(), 0)
        # Connectors as in the paper: projector of vision, linear layer of sound.
        connectors = 1024 * 4096 + 4096 + 4096 * 4096 + 4096 + 768 * 4096 + 4096
        trained = {**trained_counts(counts, recipe), "connectors": connectors}
        total = sum(counts.values()) + connectors
        size = checkpoint_bytes(trained)
        rows.append(
            f"| {experts} experts, {placement} | {total / 1e9:.1f} | "
            f"{sum(trained.values()) / 1e6:.1f} | {size / 1e9:.2f} | "
            f"{100 * size / (2 * total):.2f} % | {100 * size / (4 * total):.2f} % | "
            f"{100 * sum(trained.values()) / total:.2f} % |"
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--every", type=int, default=1)
    every = parser.parse_args().every
    began = time.perf_counter()
    rows, wrong, ranks = [], [], 0
    for world_size in WORLDS:
        count = 0
        for layout, problems in study(world_size, every):
            count += 1
            ranks += 0 if world_size == WORLDS[-1] else len(stages(layout))
            wrong += [f"{world_size} ranks, {words(layout)}: {each}" for each in problems]
        rows.append(f"| {world_size} | {count} |")
    chosen = [
        ParallelConfig(expert=8),
        ParallelConfig(tensor=2, sequence_parallel=True, expert=8),
        ParallelConfig(pipeline=4, expert=8),
        ParallelConfig(tensor=4, sequence_parallel=True, pipeline=2, expert=4, expert_tensor=2),
    ]
    text = [
        "# Layouts of 8 to 4096 ranks",
        "",
        heading("scale") + f", {time.perf_counter() - began:.0f} s",
        "",
        f"Of the layouts with TP, PP, EP up to 8 and ETP up to 2 that are possible, one in {every} "
        f"(all, if 1) was set up by Megatron "
        "with fake process groups in one process. In each: every rank is in exactly one group of "
        "each kind, groups have the size asked for, and the ranks that share a layer's experts are "
        f"in one node of {NODE} wherever their number divides {NODE}. Up to {WORLDS[-2]} ranks the "
        f"paper's language model with eight experts was built without memory on the first, the "
        f"second and the last pipeline stage ({ranks} ranks), with Megatron's optimizer or its "
        "distributed form, training router and adapters or everything: parameters by part, bytes "
        "of gradients and of optimizer state were compared with the closed form "
        "(`unimoe_mcore/model/memory.py`).",
        "",
        f"**{len(wrong)} differences.**",
        *(f"- {each}" for each in wrong),
        "",
        "| ranks | layouts looked at |",
        "| --- | --- |",
        *rows,
        "",
        "GB that the fullest of 64 ranks holds before activations, eight experts, interval, bf16:",
        "",
        "| layout | trains | optimizer whole | distributed |",
        "| --- | --- | --- | --- |",
        *memory_rows(64, chosen),
        "",
        "A stage-3 checkpoint (trained parts and Adam's two moments, fp32; language model and the "
        "paper's projectors; adapters of rank 8). The share of a model in bf16 is the largest one "
        "can take; trained parameters are the last column's share of all.",
        "",
        "| model | parameters, 10⁹ | trained, 10⁶ | checkpoint, GB | of the bf16 model | in fp32 "
        "| trained |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        *checkpoint_rows(),
        "",
    ]
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    TARGET.write_text("\n".join(text), encoding="utf8")
    print("\n".join(text))


if __name__ == "__main__":
    main()
