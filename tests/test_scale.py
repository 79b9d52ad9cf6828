"""Layouts of many ranks: groups, parameters and bytes; a subset of ``benchmarks/scale.py``."""

from __future__ import annotations

import pytest

from benchmarks.scale import ALL, differences, group_problems, paper
from unimoe_mcore.config.model import LoRAConfig, ModelConfig
from unimoe_mcore.config.parallel import ParallelConfig
from unimoe_mcore.model.memory import (
    RankMemory,
    blocks_of_stage,
    checkpoint_bytes,
    language_parameters,
    rank_memory,
    trained_counts,
)
from unimoe_mcore.runtime.imagined import imagined

MIXED = ParallelConfig(
    tensor=2, sequence_parallel=True, pipeline=4, virtual_pipeline=1, expert=4, expert_tensor=2
)


@pytest.mark.parametrize(
    ("world_size", "layout"),
    [
        (8, ParallelConfig(expert=8)),
        (64, MIXED),
        (512, ParallelConfig(tensor=8, sequence_parallel=True, pipeline=8, expert=8)),
        (4096, ParallelConfig(tensor=4, sequence_parallel=True, pipeline=8, expert=8)),
    ],
)
def test_every_rank_is_in_one_group_of_each_kind(world_size: int, layout: ParallelConfig) -> None:
    with imagined(layout, world_size, rank=world_size * 2 // 3) as world:
        assert set(world.made) >= {"tp", "pp", "dp", "ep", "expt_tp", "expt_dp", "tp_ep"}
        assert group_problems(world, layout, world_size) == []
        world.made["ep"][0][0] += 1  # the check can fail
        world.made["tp_ep"][-1][-1] = 0
        said = "; ".join(group_problems(world, layout, world_size))
    assert "ep: not every rank is in exactly one group" in said
    assert ("lies across nodes" in said) == (world_size > 8)


@pytest.mark.parametrize(
    ("layout", "world_size", "everything", "distributed"),
    [
        (ParallelConfig(expert=8), 16, False, True),
        (ParallelConfig(expert=8), 16, True, True),
        (MIXED, 64, False, False),
        (MIXED, 64, True, True),
    ],
)
def test_a_rank_of_the_paper_model_holds_what_the_formula_says(
    layout: ParallelConfig, world_size: int, everything: bool, distributed: bool
) -> None:
    recipe = paper(8)
    recipe.parallel = layout
    if everything:
        recipe.stage.train = ALL
    last = layout.pipeline - 1
    for stage in {0, last}:
        assert differences(recipe, world_size, stage, distributed) == []


def test_a_stage_3_checkpoint_is_small() -> None:
    recipe = paper(8)
    counts = language_parameters(recipe.model, 8, recipe.stage.lora, ParallelConfig(), 0)
    trained = trained_counts(counts, recipe)
    assert set(trained) == {"router", "lora.attention", "lora.mlp", "lora.experts"}
    assert 0 < checkpoint_bytes(trained) / (2 * sum(counts.values())) < 0.02


def test_bytes_of_a_rank() -> None:
    layout = ParallelConfig(expert=2)
    counts = {"attention": 100, "experts": 1000}
    whole = rank_memory(counts, {"experts": 1000}, layout, 8, "bf16")
    assert whole == RankMemory(weights=2200, gradients=4000, optimizer=12000)
    divided = rank_memory(counts, counts, layout, 8, "bf16", distributed=True)
    assert divided.optimizer == 12 * (-(-100 // 8) + 1000 // 4)
    assert rank_memory(counts, counts, layout, 8, "fp32").optimizer == 8 * 1100
    assert whole.words().startswith("0.00 GB a rank before activations")


def test_blocks_of_interleaved_stages() -> None:
    layout = ParallelConfig(pipeline=2, virtual_pipeline=2)
    assert blocks_of_stage(8, layout, 0) == [0, 1, 4, 5]
    assert blocks_of_stage(8, layout, 1) == [2, 3, 6, 7]
    model = ModelConfig()
    first, second = (language_parameters(model, 0, LoRAConfig(), layout, stage) for stage in (0, 1))
    # Tied embeddings: the last stage has a copy.
    assert first["embeddings"] == second["embeddings"]
    assert second["norms"] - first["norms"] == model.language.hidden
