"""Adapters, rates of parts and trained encoders: the same numbers in every layout.

Tolerance 1e-5 (relative, fp32), as for all layouts. Measured differences are below 1e-6. Adapters
start with both halves filled.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.conftest import World
from tests.distributed import run_distributed
from tests.workspace import branch
from unimoe_mcore.checkpoints.artefact import read_manifest

CASES = "tests.training.cases_parts"
TOLERANCE = 1e-5
BF16 = 4e-3  # one rounding of bf16

NO_ROUTING = "trainer.evaluation.routing=false"
TENSOR = ["parallel.tensor=2", "parallel.sequence_parallel=true", NO_ROUTING]
EP1, EP2 = "parallel.expert=1", "parallel.expert=2"
ETP2 = ["parallel.expert_tensor=2", "parallel.allow_untested=true", NO_ROUTING]
ALL = "stage.train=[router, lora, connectors, encoders]"
ENCODERS = "stage.train=[connectors, encoder.image, encoder.speech]"
RATES = [
    "trainer.lr=1e-3",
    "trainer.weight_decay=0.02",
    "stage.rates.router={lr: 3e-3, warmup: 3, weight_decay: 0.0}",
    "stage.rates.connectors.lr_scale=0.5",
    "stage.rates.connector.audio.weight_decay=0.3",
]


def case(recipe: str, *extra: str, **more: Any) -> dict[str, Any]:
    return {"recipe": recipe, "extra": list(extra), **more}


@pytest.fixture(scope="module")
def folder(world: World, tmp_path_factory: pytest.TempPathFactory) -> str:
    runs = ["base", "stage1", "stage2-image", "stage2-speech", "stage2-audio"]
    return str(branch(world.folder, tmp_path_factory.mktemp("parts"), *runs))


@pytest.fixture(scope="module")
def four(folder: str) -> dict[str, Any]:
    """Four processes, each layout left behind with a checkpoint before its fourth step."""
    cases = {
        "EP2xETP2": case("stage3", EP2, *ETP2, steps=4, save="ep2etp2"),
        "TP2xEP2": case("stage3", EP2, *TENSOR, steps=4, save="tp2ep2"),
    }
    ranks = run_distributed(f"{CASES}:layouts", 4, timeout=280, folder=folder, cases=cases)
    return ranks[0]


@pytest.fixture(scope="module")
def two(folder: str, four: dict[str, Any]) -> list[Any]:
    """Two processes; all that needs them in one launch."""
    cases = {
        "TP2": case("stage3", EP1, *TENSOR, steps=4),
        "EP2": case("stage3", EP2, steps=4),
        "TP2 after EP2xETP2": case("stage3", EP1, *TENSOR, load="ep2etp2"),
        "ETP2 after TP2xEP2": case("stage3", EP1, *ETP2, load="tp2ep2"),
        "all EP2": case("stage3", EP2, ALL),
        "all EP2 bf16": case("stage3", EP2, ALL, "trainer.precision=bf16"),
        "encoders DP2": case("stage1", ENCODERS, deal="skewed"),
    }
    calls = [
        ("layouts", {"cases": cases}),
        ("rates", {"extra": [EP2, *RATES]}),
        ("merged", {"extra": [EP2]}),
        ("encoder_stages", {}),
    ]
    ranks = run_distributed(f"{CASES}:together", 2, timeout=400, folder=folder, calls=calls)
    return ranks[0]


@pytest.fixture(scope="module")
def one(folder: str, four: dict[str, Any]) -> list[Any]:
    """The reference: one process."""
    cases = {
        "stage3": case("stage3", EP1, steps=4),
        "one after EP2xETP2": case("stage3", EP1, load="ep2etp2"),
        "all": case("stage3", EP1, ALL),
        "all bf16": case("stage3", EP1, ALL, "trainer.precision=bf16"),
        "encoders": case("stage1", ENCODERS, deal="skewed"),
    }
    calls = [("layouts", {"cases": cases}), ("merged", {"extra": [EP1]})]
    calls.append(("merged", {"extra": [], "recipe": "dense"}))
    return run_distributed(f"{CASES}:together", 1, timeout=200, folder=folder, calls=calls)[0]


def same(found: dict[str, Any], reference: list[list[float]]) -> None:
    assert len(found["log"]) == len(reference)
    for (loss, norm), (wanted_loss, wanted_norm) in zip(found["log"], reference, strict=True):
        assert loss == pytest.approx(wanted_loss, rel=TOLERANCE)
        assert norm == pytest.approx(wanted_norm, rel=TOLERANCE)
    assert found["apart"] == []  # replicas are bitwise equal
    assert all(change > 0 for change in found["moved"].values())


@pytest.mark.parametrize("layout", ["EP2xETP2", "TP2xEP2"])
def test_adapters_over_four_processes(layout: str, four: dict[str, Any], one: list[Any]) -> None:
    same(four[layout], one[0]["stage3"]["log"])


@pytest.mark.parametrize("layout", ["TP2", "EP2"])
def test_adapters_over_two_processes(layout: str, two: list[Any], one: list[Any]) -> None:
    same(two[0][layout], one[0]["stage3"]["log"])


@pytest.mark.parametrize(
    "layout", ["TP2 after EP2xETP2", "ETP2 after TP2xEP2", "one after EP2xETP2"]
)
def test_adapters_go_on_in_another_layout(layout: str, two: list[Any], one: list[Any]) -> None:
    same({**two[0], **one[0]}[layout], one[0]["stage3"]["log"][3:])


def test_trained_encoders_agree_with_one_process_where_a_modality_is_absent(
    two: list[Any], one: list[Any]
) -> None:
    found = two[0]["encoders DP2"]
    same(found, one[0]["encoders"]["log"])
    moved = {name.split()[0].removeprefix("model.") for name in found["moved"]}
    assert {"encoder.image.projection", "encoder.speech.projection"} < moved
    assert not any(name.startswith("encoder.audio") for name in moved)
    assert found["cached"] == ["audio"]  # neither written nor read for what trains


def test_everything_trains_at_once(two: list[Any], one: list[Any]) -> None:
    same(two[0]["all EP2"], one[0]["all"]["log"])


def test_bf16_with_fp32_main_weights(two: list[Any], one: list[Any]) -> None:
    """The first step equals that of one process to a rounding; later ones amplify roundings."""
    found, alone = two[0]["all EP2 bf16"], one[0]["all bf16"]
    assert found["types"] == ["torch.bfloat16"]
    assert found["rounded"]
    assert found["apart"] == []
    assert all(change > 0 for change in found["moved"].values())
    assert found["log"][0] == pytest.approx(alone["log"][0], rel=BF16)
    for reference in (alone, one[0]["all"]):  # in bf16 and in fp32
        for (loss, _), (wanted, _) in zip(found["log"], reference["log"], strict=True):
            assert loss == pytest.approx(wanted, rel=BF16)


def test_every_part_has_its_own_rates(two: list[Any]) -> None:
    given = two[1]["given"]
    expected = {  # at the first step: warm-up of one step, the router's of three
        "router": (1e-3, 0.0),
        "lora_": (1e-3, 0.02),
        "connector.image": (0.5e-3, 0.02),
        "connector.audio": (1e-3, 0.3),  # its own entry, not that of all connectors
    }
    for part, (lr, decay) in expected.items():
        rates = {name: rate for name, rate in given.items() if part in name}
        assert rates
        for name, rate in rates.items():
            vector = name.endswith((".bias", "norm.weight", ".0.weight")) and rate[1] == 0.0
            assert rate == pytest.approx([lr, 0.0 if vector else decay]), name
    assert two[1]["lr"] == pytest.approx(1e-3)
    assert two[1]["lrs"] == {"connectors": pytest.approx(0.5e-3)}


def test_parameters_are_listed_over_all_ranks(two: list[Any]) -> None:
    listed = two[1]["parameters"]
    # hidden 32, ffn 48, 2 blocks, 4 experts in the first, vocabulary 300, 4 heads of 2 groups
    assert listed["frozen_parts"]["experts"] == 4 * (2 * 48 * 32 + 48 * 32)
    assert listed["frozen_parts"]["mlp"] == 2 * 48 * 32 + 48 * 32
    assert listed["frozen_parts"]["embeddings"] == 300 * 32
    assert listed["frozen_parts"]["attention"] == 2 * (64 * 32 + 32 * 32)
    assert listed["frozen_parts"]["norms"] == 5 * 32
    assert listed["trained_parts"]["router"] == 4 * 32
    per_mlp = 8 * (32 + 2 * 48) + 8 * (48 + 32)
    assert listed["trained_parts"]["lora"] == 5 * per_mlp + 2 * 8 * ((32 + 64) + (32 + 32))
    assert set(listed["trained_parts"]) == {
        "router", "lora", "connector.image", "connector.speech", "connector.audio"
    }  # fmt: skip
    assert listed["frozen_parts"]["encoder.image"] == 32 * 8 * 8 * 3
    counts = [entry["count"] for entry in listed["parameters"]]
    assert listed["total"] == sum(counts)
    trained = [entry["count"] for entry in listed["parameters"] if entry["trained"]]
    assert listed["trained"] == sum(trained) == sum(listed["trained_parts"].values())


def test_merged_adapters_change_no_logit(two: list[Any], one: list[Any]) -> None:
    for found in (one[1], one[2], two[2]):  # one[2]: the dense model
        assert found["adapters"] == []
        assert found["adapted"] > 0.1 * found["largest"]
        assert found["difference"] < 1e-5 * found["largest"]


def test_adapters_are_given_as_they_are(world: World) -> None:
    manifest = read_manifest(world.folder / "runs" / "stage3" / "gives", "stage 3")
    assert (manifest.lora["rank"], manifest.lora["alpha"]) == (8, 16)
    assert any(".lora_a." in name for name in manifest.tensors)
    assert not any(name.endswith("linear_qkv.weight") for name in manifest.tensors)


def test_a_run_with_trained_encoders_continues_bitwise(two: list[Any]) -> None:
    assert len(two[3]["whole"]) == 4
    assert two[3]["parts"] == two[3]["whole"]
    assert two[3]["resumed"]


def test_a_trained_encoder_goes_with_its_connector(two: list[Any]) -> None:
    facts = two[3]
    assert facts["taken"]
    assert facts["again"]
    assert facts["passed_on"]
    assert not facts["untrained"]
