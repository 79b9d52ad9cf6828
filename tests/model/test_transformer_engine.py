"""Layers of Transformer Engine's modules beside local ones, against a stand-in of that package.

Megatron's own classes on Transformer Engine are built and run on the CPU; what lies below them is
plain PyTorch (``tests/model/stand_in``). Wiring, names, files and marks are tested, no kernel is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed import run_distributed
from unimoe_mcore.model.names import canonical

TOLERANCE = 1e-5
"""Relative to the largest value, fp32. Measured: logits below 5e-7, gradients below 2e-6."""

FUSED = {"TELayerNormColumnParallelLinear", "TERowParallelLinear", "TEDotProductAttention"}
GROUPED = {"TEGroupedMLP", "TEColumnParallelGroupedLinear", "TERowParallelGroupedLinear"}
ADAPTED = {"AdaptedTEColumnParallelLinear", "AdaptedTERowParallelLinear", "TEDotProductAttention"}
CASES = {
    "dense": FUSED,
    "dense, adapters on mlp": FUSED | ADAPTED,
    "experts": FUSED | GROUPED,
    "experts, adapters on attention": FUSED | GROUPED | ADAPTED,
    "experts, adapters everywhere": ADAPTED | {"SequentialMLP"},
}
OURS = {"PackedAttention", "WrappedTorchNorm"}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = str(tmp_path_factory.mktemp("te"))
    (rank,) = run_distributed(
        "tests.model.as_if_te:compared", 1, timeout=240, prepare=False, folder=folder
    )
    return rank


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("0.self_attention.linear_qkv.layer_norm_weight", "0.input_layernorm.weight"),
        ("1.mlp.linear_fc1.layer_norm_weight", "1.pre_mlp_layernorm.weight"),
        ("1.mlp.experts.linear_fc2.weight13", "1.mlp.experts.local_experts.13.linear_fc2.weight"),
        ("1.mlp.shared_experts.linear_fc1.weight", "1.mlp.shared_experts.linear_fc1.weight"),
        ("0.self_attention.linear_qkv.lora_a.weight", "0.self_attention.linear_qkv.lora_a.weight"),
        ("0.input_layernorm.weight", "0.input_layernorm.weight"),
    ],
)
def test_names_are_those_of_local_modules(name: str, wanted: str) -> None:
    prefix = "language_model.decoder.layers."
    assert canonical(prefix + name) == prefix + wanted
    assert canonical(prefix + wanted) == prefix + wanted


@pytest.mark.parametrize("case", CASES)
def test_layers_are_built_of_transformer_engine_s_modules(
    case: str, results: dict[str, Any]
) -> None:
    kinds = results["beside"][case]["kinds"]
    assert kinds.keys() >= CASES[case]
    assert not kinds.keys() & (OURS | (GROUPED - CASES[case]))


def test_in_fp32_attention_is_ours(results: dict[str, Any]) -> None:
    found = results["with a GPU's flags"]
    for dtype, attention in (
        ("torch.float32", "PackedAttention"),
        ("torch.bfloat16", "TEDotProductAttention"),
    ):
        assert [kind for kind in found[dtype] if kind.endswith("Attention")] == [
            "SelfAttention",
            attention,
        ]
        assert found[dtype].keys() >= GROUPED


@pytest.mark.parametrize("case", CASES)
def test_names_parts_and_marks_are_the_same(case: str, results: dict[str, Any]) -> None:
    found = results["beside"][case]
    for what in ("names", "parts", "marks"):
        assert found[what] == [], what


@pytest.mark.parametrize("case", CASES)
def test_one_reads_what_the_other_wrote(case: str, results: dict[str, Any]) -> None:
    found = results["beside"][case]
    assert found["tensors"] > 25
    assert found["given"] > 25
    for what in ("stored", "on disk", "back", "gives"):
        assert found[what] == [], what


@pytest.mark.parametrize("case", CASES)
def test_logits_loss_and_gradients_of_a_packed_row_are_the_same(
    case: str, results: dict[str, Any]
) -> None:
    for what in ("logits", "loss", "gradients"):
        assert results["beside"][case][what] < TOLERANCE, what


@pytest.mark.parametrize("case", CASES)
def test_ranks_of_a_layout_hold_the_same_blocks(case: str, results: dict[str, Any]) -> None:
    for found in results["divided"][case]:
        assert found["parameters"] > 12
        for what in ("names", "stored", "marks", "with memory"):
            assert found[what] == [], what


def test_a_mixture_is_assembled_from_what_either_wrote(results: dict[str, Any]) -> None:
    assert results["assembled"] == {"experts": 2, "apart": True, "differing": []}


def test_training_goes_on_with_the_other_modules(results: dict[str, Any]) -> None:
    trained = results["trained"]
    assert trained["inventory"]
    assert trained["files"] == []
    assert trained["transformer_engine"]["init_from"] == trained["local"]["init_from"]
    for writer in ("transformer_engine", "local"):
        found, other = trained[writer], trained["local"]
        assert found["init_from"]["left out"] == 0
        assert found["begun"][0][0] > 1.1 * found["on"][0]  # something was learnt
        for step, wanted in zip(found["begun"], other["begun"], strict=True):
            assert step == pytest.approx(wanted, rel=TOLERANCE)
        assert found["taken on"] == pytest.approx(found["on"], rel=TOLERANCE)
        assert found["first loss of init_from"] == pytest.approx(found["on"][0], rel=TOLERANCE)


def test_adapters_on_fused_layers_are_refused(results: dict[str, Any]) -> None:
    assert results["refused"].keys() == {"attention", "mlp", "experts"}
    assert all("is fused with others" in said for said in results["refused"].values())


def test_the_stand_in_is_not_seen_elsewhere() -> None:
    with pytest.raises(ImportError):
        __import__("transformer_engine")
    assert (Path(__file__).parent / "stand_in" / "transformer_engine").is_dir()
