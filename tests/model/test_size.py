"""The paper's sizes and ablations: recipes, counted on the modules that Megatron builds of them."""

from __future__ import annotations

import pytest
import torch

from unimoe_mcore.config.composition import compose_recipe
from unimoe_mcore.config.model import LanguageConfig
from unimoe_mcore.config.parallel import ParallelConfig
from unimoe_mcore.config.recipe import Recipe
from unimoe_mcore.model.build import build_model
from unimoe_mcore.model.size import language_size
from unimoe_mcore.runtime.capabilities import detect, transformer_flags
from unimoe_mcore.runtime.imagined import imagined

TABLE_1 = {
    "unimoe_7b_4e": (13.2, 8.9),
    "unimoe_7b_4e_dense32": (19.7, 11.1),
    "unimoe_7b_8e": (21.9, 8.9),
    "unimoe_7b_8e_dense32": (37.0, 11.1),
}
"""Billions of parameters, all and active, of the paper's Table 1."""

ONE_PROCESS = ("parallel.expert=1", "trainer.evaluation.routing=false")


def mixture(*overrides: str) -> Recipe:
    """Stage 3 in one process, without towers and adapters: the language model as published."""
    recipe = compose_recipe("stage3", [*ONE_PROCESS, *overrides])
    recipe.model.towers, recipe.stage.lora.targets = {}, []
    return recipe


def built(recipe: Recipe) -> list[tuple[int, list[int]]]:
    """Parameters of every layer of Megatron's model outside of experts, and of each expert.

    On the meta device, at its real size. The first entry is what belongs to no layer.
    """
    with imagined(ParallelConfig(), 1) as world:
        flags = transformer_flags(detect())
        model = build_model(recipe, world.groups, {}, torch.bfloat16, flags, memory=False)
    whole = sum(p.numel() for p in model.parameters())
    layers = []
    for layer in model.language_model.decoder.layers:
        mixed = getattr(getattr(layer, "mlp", None), "experts", None)
        experts = [] if mixed is None else mixed.local_experts
        each = [sum(p.numel() for p in expert.parameters()) for expert in experts]
        layers.append((sum(p.numel() for p in layer.parameters()) - sum(each), each))
    outside = whole - sum(rest + sum(each) for rest, each in layers)
    return [(outside, []), *layers]


def sizes(layers: list[tuple[int, list[int]]], top_k: int) -> tuple[int, int]:
    """All parameters, and those that one token passes."""
    return (
        sum(rest + sum(each) for rest, each in layers),
        sum(rest + sum(each[:top_k]) for rest, each in layers),
    )


@pytest.mark.parametrize("model", TABLE_1)
def test_the_paper_models_as_built_have_the_sizes_of_its_table_1(model: str) -> None:
    recipe = mixture(f"model={model}", "experts=identical")
    total, active = sizes(built(recipe), recipe.model.moe.top_k)
    assert (round(total / 1e9, 1), round(active / 1e9, 1)) == TABLE_1[model]
    said = language_size(recipe)
    assert (said.total, said.active) == (total, active)  # what a run prints
    assert f"{total / 1e9:.2f} B parameters, {active / 1e9:.2f} B of them" in said.words()


PLACES = {
    "all": [0, 1, 2, 3, 4, 5],
    "interval": [0, 2, 4],
    "first_half": [0, 1, 2],
    "second_half": [3, 4, 5],
}
"""Blocks with experts, of six (paper, Table 7 d)."""

SHAPE = LanguageConfig(
    blocks=6, hidden=32, ffn=48, heads=4, kv_heads=2, vocabulary=300, max_tokens=64
)


NAMED = {1: "identical", 2: "specialised_2", 4: "specialised", 6: "identical", 8: "specialised"}
"""Number of experts -> recipe of what they are."""

CASES = [
    *(("all", experts, top_k) for experts in NAMED for top_k in (1, 2) if top_k <= experts),
    *((placement, 4, 2) for placement in PLACES if placement != "all"),
]
"""Placement, experts, experts of a token."""


@pytest.mark.parametrize(("placement", "experts", "top_k"), CASES)
def test_every_ablation_is_a_recipe_value(placement: str, experts: int, top_k: int) -> None:
    """Placement, number of experts, experts per token, identical or not: layers and counts."""
    recipe = mixture(
        *(f"model.language.{key}={value}" for key, value in vars(SHAPE).items()),
        f"model.moe.placement={placement}",
        f"model.moe.experts={experts}",
        f"model.moe.top_k={top_k}",
        f"model.moe.score={'softmax' if top_k > 1 else 'pre_softmax'}",
        f"experts={NAMED[experts]}",
    )
    assert len(recipe.stage.experts) == experts
    layers = built(recipe)
    mlps = [layer for number, layer in enumerate(layers[1:]) if number % 2]
    sparse = [block for block, (_, each) in enumerate(mlps) if each]
    expert, attention = 3 * 32 * 48, 32 * (32 + 2 * 16 + 32)
    assert sparse == PLACES[placement]
    assert all(mlps[block][1] == [expert] * experts for block in sparse)
    # Embedding (tied) and norms; attention; MLPs; routers.
    rest = 300 * 32 + 13 * 32 + 6 * attention + (6 - len(sparse)) * expert
    rest += len(sparse) * experts * 32
    said = language_size(recipe)
    assert sizes(layers, top_k) == (said.total, said.active)
    assert said.total == rest + len(sparse) * experts * expert
    assert said.active == rest + len(sparse) * top_k * expert


def test_a_dense_model_is_all_at_work() -> None:
    said = language_size(compose_recipe("base", ["model=unimoe_7b_4e"]))
    assert round(said.total / 1e9, 1) == 6.7  # Vicuna-7B in Table 1
    assert said.active == said.total
    assert said.words() == "language model: 6.74 B parameters, dense"
