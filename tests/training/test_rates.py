"""Learning rates as functions of the step, by part; what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from unimoe_mcore.config.composition import compose_recipe, dump, load
from unimoe_mcore.config.errors import UserError
from unimoe_mcore.config.stage import RateConfig, rate_of, trains
from unimoe_mcore.training.schedule import rates

TRAINER = [
    "trainer.lr=1e-3",
    "trainer.warmup=2",
    "trainer.steps=12",
    "trainer.min_lr=0.1",
    "trainer.weight_decay=0.02",
]
RATES = [
    "stage.rates.router.lr=4e-3",
    "stage.rates.router.warmup=8",
    "stage.rates.connectors={lr_scale: 0.5, weight_decay: 0.0}",
    "stage.rates.connector.audio.warmup=0",
]


def test_every_part_follows_its_own_curve() -> None:
    recipe = compose_recipe("stage3", [*TRAINER, *RATES])
    at = [rates(step, recipe) for step in range(12)]
    assert at[0][""].lr == pytest.approx(0.5e-3)
    assert at[2][""].lr == pytest.approx(1e-3)
    assert [step["router"].lr for step in at[:8]] == pytest.approx(
        [0.5e-3 * n for n in range(1, 9)]
    )
    assert at[2]["connectors"].lr == pytest.approx(0.5e-3)
    assert at[0]["connector.audio"].lr == pytest.approx(1e-3)
    half = 0.1 + 0.9 * 0.5  # of the cosine, half-way between warm-up and the last step
    assert at[7][""].lr == pytest.approx(1e-3 * half)
    assert at[10]["router"].lr == pytest.approx(4e-3 * half)
    decays = {part: rate.weight_decay for part, rate in at[5].items()}
    assert decays == {"": 0.02, "router": 0.02, "connectors": 0.0, "connector.audio": 0.02}


def test_a_part_follows_its_own_entry_before_its_groups() -> None:
    stage = compose_recipe("stage3", RATES).stage
    assert rate_of(stage, "connector.audio") == "connector.audio"
    assert rate_of(stage, "connector.image") == "connectors"
    assert rate_of(stage, "router") == "router"
    assert rate_of(stage, "lora") == ""


def test_groups_of_parts_stand_for_every_tower() -> None:
    stage = compose_recipe("stage1", ["stage.train=[connectors, encoder.image]"]).stage
    assert trains(stage, "connector.speech")
    assert trains(stage, "encoder.image")
    assert not trains(stage, "encoder.speech")
    assert not trains(stage, "experts")


def test_rates_survive_a_round_trip(tmp_path: Path) -> None:
    recipe = compose_recipe("stage3", RATES)
    assert recipe.stage.rates["connector.audio"] == RateConfig(warmup=0)
    (tmp_path / "config.yaml").write_text(dump(recipe))
    assert load(tmp_path / "config.yaml") == recipe


REFUSED = {
    "stage.rates.router.lr=-1": "stage.rates.router.lr is -1.0, it must be greater than 0",
    "stage.rates.router.lr=inf": "stage.rates.router.lr is inf",
    "stage.rates.router.lr_scale=0": "stage.rates.router.lr_scale is 0.0",
    "stage.rates.router.warmup=-1": "stage.rates.router.warmup is -1, it must not be negative",
    "stage.rates.router.weight_decay=-0.1": "weight_decay is -0.1, it must not be negative",
    "stage.rates.router={lr: 1, lr_scale: 1}": "it can set only one of them",
    "stage.rates.router={}": "stage.rates.router is empty",
    "stage.rates.router={rate: 1}": "'rate' not in 'RateConfig'",
    "stage.rates.router=1": "it must be a group of lr, lr_scale, warmup, weight_decay",
    "stage.rates.experts.lr=1": "stage.rates names experts, which does not train",
    "stage.rates.encoders.lr=1": "stage.rates names encoders, which does not train",
    "stage.rates.router.warmup=1.5": "could not be converted to Integer",
    "stage.train=[router, encoder.smell]": "stage.train names 'encoder.smell'",
}


@pytest.mark.parametrize("override", REFUSED)
def test_wrong_rates_are_refused_in_words(override: str) -> None:
    with pytest.raises(UserError, match="(?s)^The recipe") as refusal:
        compose_recipe("stage3", [override])
    assert REFUSED[override] in str(refusal.value)


def test_adapters_of_a_mixture_or_a_dense_model_are_merged_on_demand() -> None:
    for recipe in ("stage3", "dense"):
        assert compose_recipe(recipe, ["stage.lora.merge=true"]).stage.lora.merge
    for recipe in ("stage1", "stage2"):
        with pytest.raises(UserError, match=r"stage\.lora\.merge=true is for a moe or dense stage"):
            compose_recipe(recipe, ["stage.lora.merge=true"])
