"""What is exported is what others load: equal to our model's logits, or refused with the reason."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from data_pipeline.conversation.tokenizer import TextTokenizer
from tests.conftest import World
from tests.distributed import REPOSITORY, run_distributed
from tests.exporting.texts import VOCABULARY, WORDS
from unimoe_mcore.checkpoints.deferred import Deferred
from unimoe_mcore.checkpoints.llama import rules_of, sizes_of
from unimoe_mcore.config.model import LanguageConfig
from unimoe_mcore.exporting.tokenizer_files import chat_template, says_the_same
from unimoe_mcore.exporting.unpacked import rows_of, unpacked
from unimoe_mcore.exporting.written import write_safetensors

TOLERANCE = 1e-4
"""Of the largest logit, fp32: sums in another order, once more where adapters are merged first.
Measured: up to 1.4e-5."""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    (rank,) = run_distributed(
        "tests.exporting.cases_export:all_cases",
        1,
        timeout=400,
        folder=str(tmp_path_factory.mktemp("export")),
    )
    return rank


def same(found: dict[str, float]) -> None:
    assert found["difference"] < TOLERANCE
    assert found["deviation"] > 1


@pytest.mark.parametrize("name", ["tied", "untied", "llama3"])
def test_a_base_is_a_llama_and_comes_back_bitwise(name: str, results: dict[str, Any]) -> None:
    found = results["llamas"][name]
    same(found)
    assert found["files"] > 2
    assert found["same"]
    assert found["shape"]
    assert not found["left out"]
    assert len(found["printed"]) == 1


def test_a_checkpoint_of_a_base_is_what_the_base_gave(results: dict[str, Any]) -> None:
    assert results["llamas"]["run"] is True


@pytest.mark.parametrize("name", ["spare", "no spare"])
def test_rows_that_only_fill_up_are_left_out_and_come_back(
    name: str, results: dict[str, Any]
) -> None:
    found = results["again"][name]
    assert found["same"]
    assert found["weights"]
    assert found["rows"][0] > found["rows"][1] == found["tokens"]
    assert all(found["tokenizer"]), found["tokenizer"]


def test_transformers_has_the_tokens_and_the_chat_template_of_a_base_trained_here(
    results: dict[str, Any],
) -> None:
    assert all(results["spoken"]), results["spoken"]


def test_a_dense_run_is_a_llama_with_its_adapters_merged_or_apart(results: dict[str, Any]) -> None:
    found = results["dense"]
    same(found["merged"])
    same(found["peft"])
    assert found["without"]["difference"] > 0.1
    assert found["given"]
    assert found["given merged"]
    same(results["expert"])


def test_what_is_left_out_is_named_on_the_terminal_and_in_the_folder(
    results: dict[str, Any],
) -> None:
    found = results["dense"]
    for tower in ("image", "speech", "audio"):
        line = f"connector.{tower}: a language model has no place for it"
        assert any(line in said for said in found["printed"])
        assert line in found["readme"]


MIXTURES = {"interval": [1], "all": [], "experts only": [0], "attention only": [1]}


@pytest.mark.parametrize("name", MIXTURES)
def test_a_mixture_is_a_mixtral_with_its_adapters_merged_or_apart(
    name: str, results: dict[str, Any]
) -> None:
    found = results["mixtures"][name]
    same(found["merged"])
    same(found["peft"])
    assert found["without"]["difference"] > 0.1
    assert found["config"]["unimoe_dense_blocks"] == MIXTURES[name]
    assert ("are dense: each of" in found["readme"]) is bool(MIXTURES[name])


def test_a_mixtral_comes_back_bitwise(results: dict[str, Any]) -> None:
    assert results["again"]["mixtral"] == []


def test_numbers_are_rounded_once_to_the_type_that_is_asked_for(results: dict[str, Any]) -> None:
    assert results["bf16"] == {"same": True, "said": "bfloat16"}


def test_uni_moes_names_and_shapes(results: dict[str, Any]) -> None:
    found = results["official"]
    mlp = {"gate_proj": [48, 32], "up_proj": [48, 32], "down_proj": [32, 48]}
    assert found["expert"] == {
        f"model.layers.{block}.mlp.{name}.weight": shape
        for block in range(2)
        for name, shape in mlp.items()
    }
    assert found["given"]
    assert found["mixture"]
    assert found["gates"] == {f"model.layers.{b}.mlp.gate.weight": [3, 32] for b in range(2)}
    wanted = {}
    places = ["1.mlp", *(f"0.mlp.experts.{e}" for e in range(3))]
    attention = {"q_proj": [32, 32], "k_proj": [16, 32], "v_proj": [16, 32], "o_proj": [32, 32]}
    layers = {**dict.fromkeys(places, mlp), "0.self_attn": attention, "1.self_attn": attention}
    for place, projections in layers.items():
        for name, (rows, columns) in projections.items():
            stem = f"base_model.model.model.layers.{place}.{name}.lora_"
            wanted |= {f"{stem}A.weight": [8, columns], f"{stem}B.weight": [rows, 8]}
    assert found["adapters"] == wanted
    assert found["projector"] == {
        "model.mm_projector.0.weight": [32, 32],
        "model.mm_projector.0.bias": [32],
        "model.mm_projector.2.weight": [32, 32],
        "model.mm_projector.2.bias": [32],
    }
    assert found["same"] == [True, True]
    assert any("left out: connector.image: it has a norm before it" in s for s in found["printed"])
    assert [line.split(":")[1] for line in found["said"][1:]] == [
        " connector.speech",
        " connector.audio",
    ]


REFUSED = {
    "pre-softmax as mixtral": "do not sum to 1 (model.moe.score=pre_softmax)",
    "pre-softmax as uni-moe": "do not sum to 1 (model.moe.score=pre_softmax)",
    "pre-softmax as peft": "do not sum to 1 (model.moe.score=pre_softmax)",
    "sigmoid as mixtral": "come from sigmoids (model.moe.score=sigmoid)",
    "bias as mixtral": "are chosen by score and bias (model.moe.balance=bias)",
    "shared as mixtral": "every token passes a shared expert (stage.shared_expert)",
    "shared as uni-moe": "every token passes a shared expert (stage.shared_expert)",
    "half as uni-moe": "it has experts in the blocks first_half (model.moe.placement)",
    "a mixture as llama": "has 3 experts, a Llama has none: export it --as mixtral",
    "a base as mixtral": "has no experts: export it --as llama",
    "a base as uni-moe": "has no experts: export it --as llama",
    "a base as peft": "has no adapters: it trained none",
    "merged adapters": "or gave them merged into its weights",
    "connectors as llama": "has trained connectors only",
    "connectors as uni-moe": "has nothing with an equal in Uni-MoE: connector.image: it has a norm",
    "an expert without its base": "holds an expert without its base",
    "a mixture without its experts": "holds what a moe stage trained, but not what that stands on",
    "nothing": "is no run, no checkpoint, and nothing that a stage gave",
    "damaged": "is damaged: its checksum is not",
    "no such checkpoint": "has no checkpoint step-7, only step-3",
    "no size": "--shard-size is 0, it must be at least 1 byte",
    "a folder that is there": "exists: name another folder, or delete it",
    "unreadable in the middle": "cannot be read",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_equal_is_refused_in_one_sentence(name: str, results: dict[str, Any]) -> None:
    sentence = results["refused"][name]
    assert REFUSED[name] in sentence
    assert "\n" not in sentence
    assert sentence.endswith(".")


def test_what_only_training_does_is_no_reason(results: dict[str, Any]) -> None:
    assert not [name for name in results["refused"] if name.startswith("training")]
    assert "half as mixtral" not in results["refused"]


def test_nothing_is_left_of_what_was_refused(results: dict[str, Any]) -> None:
    assert results["refused"]["left behind"] == "[]"


def test_a_trained_run_of_two_processes_exports_as_what_it_gave(
    world: World, tmp_path: Path
) -> None:
    """Its checkpoint has experts and stretches of two ranks; what it gave was written otherwise."""
    run = world.folder / "runs" / "stage3"
    script = (
        "import sys; from unimoe_mcore.export import main\n"
        f"main([{str(run)!r}, 'run', '--as', 'mixtral'])\n"
        f"main([{str(run / 'gives')!r}, 'gives', '--as', 'mixtral'])\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 0, ended.stderr
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("run", "gives"))
    assert one.keys() == other.keys()
    assert len(one) > 30
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_chat_template_that_says_other_tokens_is_found_out() -> None:
    tokenizer = TextTokenizer.train(WORDS, VOCABULARY)
    bare = type(tokenizer._tokenizer).from_str(tokenizer.serialised())
    written = chat_template(tokenizer.template)
    assert says_the_same(written, tokenizer, bare)
    assert not says_the_same(written.replace("| trim", ""), tokenizer, bare)
    assert not says_the_same(written.replace("<ans>", "<eos>"), tokenizer, bare)


def test_taking_apart_undoes_putting_together() -> None:
    """Every rule, with as many queries a group as there may be; theirs are told by their values."""
    for kv_heads in (1, 2, 4):
        language = LanguageConfig(blocks=1, hidden=16, ffn=12, heads=4, kv_heads=kv_heads)
        sizes = sizes_of(language)
        for rule in rules_of(language):
            theirs = [torch.randn([sizes[axis] for axis in axes]) for axes in rule.shapes]
            ours = rule.combine(theirs, language)
            apart = dict(unpacked(rule, Deferred(tuple(ours.shape), lambda v=ours: v), language))
            for name, value in zip(rule.theirs, theirs, strict=True):
                assert torch.equal(apart[name].read(), value)
                assert apart[name].shape == tuple(value.shape)
            assert torch.cat(rows_of(rule, language)).sort()[0].tolist() == list(range(len(ours)))


def test_files_are_as_small_as_asked_and_hold_every_tensor_once(tmp_path: Path) -> None:
    values = {f"t{n}": torch.randn(n + 1, 8) for n in range(6)}
    tensors = {n: Deferred(tuple(v.shape), lambda v=v: v) for n, v in values.items()}
    files = write_safetensors(tmp_path, "model", tensors, torch.bfloat16, 96)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert files == [*sorted(set(index["weight_map"].values())), "model.safetensors.index.json"]
    assert index["metadata"]["total_size"] == 2 * sum(v.numel() for v in values.values())
    for name, value in values.items():
        assert torch.equal(load_file(tmp_path / index["weight_map"][name])[name], value.bfloat16())
    sizes = {f: sum(t.nbytes for t in load_file(tmp_path / f).values()) for f in files[:-1]}
    assert all(size <= 96 for size in sizes.values())
    assert write_safetensors(tmp_path, "one", tensors, torch.float32, 10**6) == ["one.safetensors"]
