"""Recipes: what is composed, and what is refused in which words."""

from __future__ import annotations

from pathlib import Path

import pytest

from unimoe_mcore.config.composition import RECIPES, compose_recipe, dump, load
from unimoe_mcore.config.errors import UserError
from unimoe_mcore.config.model import layer_pattern, moe_blocks


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES.glob("*.yaml")))
def test_every_recipe_composes_and_survives_a_round_trip(name: str, tmp_path: Path) -> None:
    recipe = compose_recipe(name)
    path = tmp_path / "config.yaml"
    path.write_text(dump(recipe))
    assert load(path) == recipe


def test_overrides_reach_typed_fields() -> None:
    recipe = compose_recipe("stage2", ["trainer.lr=1e-4", "stage.expert=speech"])
    assert recipe.trainer.lr == 1e-4
    assert recipe.name == "stage2-speech"
    assert "spk_qa" in recipe.data.datasets
    assert recipe.stage.train == ["lora", "connector.speech"]


REFUSED = {
    "trainer.lrr=1": "no such key",
    "trainer.steps=abc": "could not be converted to Integer",
    "trainer.steps=0": "trainer.steps is 0, it must be at least 1",
    "trainer.keep_every=100": "trainer.keep_every=100 is no multiple of trainer.checkpoint_every=",
    "trainer.keep_every=-1": "trainer.keep_every is -1, it must not be negative",
    "trainer.resume_changes=[seed]": "trainer.resume_changes names 'seed', it may name steps, lr",
    "trainer.precision=fp8": "must be one of auto, bf16, fp32",
    "trainer.lr=-1": "trainer.lr is -1.0",
    "trainer.betas=[0.9]": "two numbers",
    "stage.kind=final": "stage.kind is 'final'",
    "stage.experts=[base]": "names 1 experts",
    "stage.lora.targets=[attenion]": "stage.lora.targets is 'attenion'",
    "stage.train=[conectors]": "parts of a moe stage are",
    "stage.connectors.smell=runs/x/gives": "no tower",
    "parallel.expert=3": "does not divide the 4 experts",
    "parallel.tensor=2": "sequence_parallel=true",
    "model.language.heads=3": "not divisible by model.language.heads=3",
    "model.moe.placement=odd": "model.moe.placement is 'odd'",
    "data.datasets.img_left=0": "must be greater than 0",
    "data.deal=some": "must be one of balanced, sharded",
    "data.compose=all": "must be one of mixed, uniform",
    "data.combinations={image: 2}": "a combination is like image+text",
    "data.combinations={image+text: -1}": "must not be negative",
    "data.shuffle.block=0": "data.shuffle.block is 0",
    "data.workers=-1": "data.workers is -1",
    "data.sample_seconds=0": "data.sample_seconds is 0",
    "data.quarantine_most=2": "must be from 0 to 1",
    "data.changes=[{step: 0}]": "must be ascending, from 1 on",
    "data.changes=[{step: 5}, {step: 3}]": "must be ascending, from 1 on",
    "data.changes=[{step: 5, compose: odd}]": "data.changes[0].compose is 'odd'",
    "data.changes=[{step: 5, datasets: {img_left: 0}}]": "data.changes[0].datasets.img_left is 0",
    "data.changes=[{stepp: 5}]": "no such key",
    "model.towers.image.frame_order=random": "must be one of average, ordered",
    "name=a/b": "plain folder name",
    "foo": "Error parsing override",
}


@pytest.mark.parametrize("override", REFUSED)
def test_a_wrong_key_or_value_is_refused_in_words(override: str) -> None:
    with pytest.raises(UserError) as refused:
        compose_recipe("stage3", [override])
    assert REFUSED[override] in str(refused.value)


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(UserError) as refused:
        compose_recipe("stage3", ["trainer.lrr=1", "trainer.steps=abc"])
    assert "trainer.lrr" in str(refused.value)
    assert "trainer.steps" in str(refused.value)
    with pytest.raises(UserError) as refused:
        compose_recipe("stage3", ["trainer.steps=0", "data.pad_to=0", "model.moe.placement=odd"])
    assert "3 problems" in str(refused.value)


def test_uniform_steps_cannot_be_sharded() -> None:
    for override in ("data.compose=uniform", "data.changes=[{step: 9, compose: uniform}]"):
        with pytest.raises(UserError, match=r"choose data\.deal=balanced"):
            compose_recipe("stage3", ["data.deal=sharded", override])


def test_changes_and_combinations_are_typed() -> None:
    changed = "data.changes=[{step: 9, datasets: {img_left: 2}}, {step: 12, temperature: 1}]"
    data = compose_recipe("stage3", [changed, "data.combinations={image+text: 2}"]).data
    assert [change.step for change in data.changes] == [9, 12]
    assert data.changes[0].datasets == {"img_left": 2.0}
    assert data.changes[0].temperature is None
    assert data.combinations == {"image+text": 2.0}


def test_an_unknown_recipe_names_the_known_ones() -> None:
    with pytest.raises(UserError, match="base, stage1, stage2, stage3"):
        compose_recipe("stage4")


def test_a_damaged_resolved_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("trainer: [1, 2")
    with pytest.raises(UserError, match="cannot be read"):
        load(path)
    path.write_text("trainer: {stepz: 3, lr: fast}\nnmae: x\n")
    with pytest.raises(UserError) as refused:
        load(path)
    for words in ("trainer.stepz", "trainer.lr is 'fast'", "nmae"):
        assert words in str(refused.value)


def test_expert_placement_of_the_paper() -> None:
    assert moe_blocks("interval", 6) == [0, 2, 4]
    assert moe_blocks("all", 3) == [0, 1, 2]
    assert moe_blocks("first_half", 4) == [0, 1]
    assert moe_blocks("second_half", 4) == [2, 3]
    model = compose_recipe("stage3").model
    assert layer_pattern(model.language, model.moe, 4) == "*E*-*E*-"
    assert layer_pattern(model.language, model.moe, 0) == "*-*-*-*-"
