"""Recipes: what is composed, and what is refused in which words."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from unimoe_mcore.config.composition import RECIPES, compose_recipe, dump, load, load_past
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
    "trainer.validation.every=-1": "trainer.validation.every is -1, it must not be negative",
    "trainer.validation.split=train": "trainer.validation.split is 'train', it must be one of",
    "trainer.resume_changes=[seed]": "trainer.resume_changes names 'seed', it may name steps, lr",
    "trainer.precision=fp8": "must be one of auto, bf16, fp32",
    "trainer.lr=-1": "trainer.lr is -1.0",
    "trainer.betas=[0.9]": "two numbers",
    "stage.kind=final": "stage.kind is 'final'",
    "stage.experts=[base]": "model.moe.top_k is 2, it must be from 1 to 1",
    "stage.experts=[]": "stage.experts is empty",
    "experts=identical": "model.moe.top_k is 2, it must be from 1 to 1",
    "experts=equal": "Could not find 'experts/equal'",
    "model.moe.experts=6": "model.moe.experts=6 cannot be made of the 4 entries of stage.experts",
    "model.moe.experts=2": "model.moe.experts=2 cannot be made of the 4 entries of stage.experts",
    "model.moe.experts=-1": "model.moe.experts=-1 cannot be made of the 4 entries",
    "model.moe.top_k=5": "model.moe.top_k is 5, it must be from 1 to 4",
    "model.moe.top_k=0": "model.moe.top_k is 0, it must be from 1 to 4",
    "stage.lora.targets=[attenion]": "stage.lora.targets is 'attenion'",
    "stage.train=[conectors]": "parts of a moe stage are",
    "stage.connectors.smell=runs/x/gives": "no tower",
    "parallel.expert=3": "does not divide the 4 experts",
    "parallel.tensor=2": "sequence_parallel=true",
    "model.language.heads=3": "not divisible by model.language.heads=3",
    "model.moe.placement=odd": "model.moe.placement is 'odd'",
    "model.moe.score=tanh": "must be one of softmax, pre_softmax, sigmoid",
    "model.moe.balance=even": "must be one of none, official, sequence, global",
    "model.moe.balance=bias": "for model.moe.score=sigmoid only, not softmax",
    "model.moe.balance_coefficient=-1": "model.moe.balance_coefficient is -1.0",
    "model.moe.balance_final=0.1": "needs the step at which it is reached",
    "model.moe.z_loss=-1": "model.moe.z_loss is -1.0, it must not be negative",
    "model.moe.capacity=-1": "model.moe.capacity is -1.0",
    "model.moe.jitter=1": "model.moe.jitter is 1.0, it must be from 0 to below 1",
    "model.moe.top_k=1": "gives every chosen expert the weight 1, and the router no gradient",
    "model.moe.router_warmup=150": "leaves none of trainer.steps=150 for the experts",
    "stage.train=[router, lora, connectors, shared]": "stage.shared_expert is empty",
    "trainer.router_every=-1": "trainer.router_every is -1",
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


EIGHT = ["audiocap", "basev", "", "base1", "base4", "base7", "", "base7"]
"""The released eight-expert model's experts in their order; empty for the base's own MLP."""


def test_experts_are_named_by_a_recipe_group() -> None:
    """Entries are repeated in their order until there are model.moe.experts of them."""

    def named(*overrides: str) -> list[str]:
        return compose_recipe("stage3", ["paths.runs=x", *overrides]).stage.experts

    own = ["base", "x/stage2-image/gives", "x/stage2-speech/gives", "x/stage2-audio/gives"]
    assert named() == own
    assert named("model=unimoe_7b_4e") == own
    assert named("model=unimoe_7b_8e") == own + own
    assert named("model=unimoe_7b_4e", "experts=identical") == ["base"] * 4
    assert named("model.moe.experts=6", "experts=identical") == ["base"] * 6
    assert named("experts=specialised_2") == own[:2]
    assert named("model=unimoe_7b_8e_dense32", "experts=official_8") == [
        f"x/experts/mlp_{name}" if name else "base" for name in EIGHT
    ]
    assert named("model=unimoe_7b_8e_dense32", "experts=released_8") == [
        f"x/experts/released_{number}" for number in range(8)
    ]
    listed = "stage.experts=[x/experts/mlp_base4, base, x/experts/mlp_base1, base]"
    assert named(listed, "experts=identical") == listed[15:-1].split(", ")
    alone = ["model.moe.experts=1", "model.moe.top_k=1", "model.moe.score=pre_softmax"]
    assert named("experts=identical", "parallel.expert=1", *alone) == ["base"]


def test_router_settings_that_would_do_nothing_are_refused() -> None:
    without_router = ["stage.train=[lora, connectors]"]
    bias = ["model.moe.balance=bias", "model.moe.score=sigmoid"]
    for overrides, words in (
        (["model.moe.balance=global", "model.moe.balance_coefficient=0"], "does nothing"),
        ([*bias, "model.moe.bias_rate=0"], "bias_rate=0 does nothing"),
        (["model.moe.balance=global", *without_router], "balance=global needs router"),
        (["model.moe.z_loss=0.1", *without_router], "z_loss=0.1 needs router"),
        (["model.moe.router_warmup=5", *without_router], "router_warmup=5 needs router"),
        (
            ["model.moe.router_warmup=5", "stage.lora.targets=[attention]"],
            "stage.train does not train them",
        ),
    ):
        with pytest.raises(UserError, match=words):
            compose_recipe("stage3", overrides)
    with pytest.raises(UserError, match="only a moe stage has experts"):
        compose_recipe("stage1", ["stage.shared_expert=base"])
    assert compose_recipe("stage3", bias).model.moe.balance == "bias"


def test_all_problems_of_a_layout_are_told_with_the_others() -> None:
    with pytest.raises(UserError) as refused:
        compose_recipe(
            "stage3",
            [
                "parallel.tensor=2", "parallel.pipeline=3", "parallel.expert_tensor=5",
                "parallel.expert=3", "parallel.virtual_pipeline=2", "parallel.context=2",
            ],
            world_size=8,
        )  # fmt: skip
    for words in (
        "makes groups of 12, which do not divide 8 processes",
        "makes groups of 45, which do not divide 8 processes",
        "parallel.context=2 is not possible yet",
        "parallel.tensor=2 needs parallel.sequence_parallel=true",
        "parallel.expert=3 does not divide the 4 experts",
        "model.language.ffn=672 is not divisible by parallel.expert_tensor=5",
        "4 blocks cannot be divided evenly over 6 pipeline stages",
        "was never compared with one process",
    ):
        assert words in str(refused.value)


def test_an_untested_layout_needs_a_word() -> None:
    layout = ["parallel.tensor=2", "parallel.sequence_parallel=true", "parallel.expert_tensor=2"]
    layout += ["parallel.expert=1", "trainer.evaluation.routing=false"]
    with pytest.raises(UserError, match=r"tensor x expert_tensor .* parallel\.allow_untested=true"):
        compose_recipe("stage3", layout, world_size=4)
    allowed = compose_recipe("stage3", [*layout, "parallel.allow_untested=true"], world_size=4)
    assert allowed.parallel.allow_untested


def test_a_stage_without_experts_has_none_to_divide() -> None:
    for key in ("expert", "expert_tensor"):
        with pytest.raises(UserError, match=f"parallel.{key}=2, but align stages have no experts"):
            compose_recipe("stage1", [f"parallel.{key}=2"])


def test_a_dense_stage_has_connectors_to_begin_with_and_no_router() -> None:
    for override, words in (
        ("stage.start=''", "a dense stage needs the connectors of stage 1"),
        ("stage.train=[router, lora]", "parts of a dense stage are embeddings"),
        ("stage.lora.targets=[experts]", "experts, which a dense stage does not give"),
        ("parallel.expert=2", "dense stages have no experts"),
    ):
        with pytest.raises(UserError, match=words):
            compose_recipe("dense", [override])


@pytest.mark.parametrize("name", ["stage1", "stage2", "stage3", "dense"])
def test_a_demo_recipe_is_its_stage_on_real_weights(name: str) -> None:
    recipe, plain = compose_recipe(name, [f"+demo={name}"]), compose_recipe(name)
    assert recipe.model.language.blocks == 30
    assert recipe.model.towers == plain.model.towers
    assert recipe.trainer.precision == "bf16"
    assert recipe.stage.kind == plain.stage.kind
    assert recipe.stage.base == "runs/demo/base/gives"


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
    with pytest.raises(UserError, match="base, dense, stage1, stage2, stage3"):
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


def test_how_a_past_run_was_logged_does_not_matter(tmp_path: Path) -> None:
    recipe = compose_recipe("stage3")
    path = tmp_path / "config.yaml"
    now = OmegaConf.to_container(OmegaConf.create(dump(recipe)))
    path.write_text(OmegaConf.to_yaml({**now, "logging": {"wandb": "disabled", "x": 1}}))
    assert load_past(path) == recipe
    with pytest.raises(UserError, match=r"has 2 problems:\n.*logging.wandb"):
        load(path)
    path.write_text(path.read_text() + "typo: 1\n")
    with pytest.raises(UserError, match=r"config.yaml is wrong: there is no key typo.*\.$"):
        load_past(path)
    path.write_text("- a list")
    with pytest.raises(UserError, match="is no recipe"):
        load_past(path)
