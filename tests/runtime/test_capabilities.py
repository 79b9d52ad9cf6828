from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.metadata
import sys
from pathlib import Path

import pytest
import torch

from unimoe_mcore.runtime import capabilities, cpu, devices, without_te
from unimoe_mcore.runtime.capabilities import Capabilities, Choice, Machine, transformer_flags

YES, NO = Choice(True, "2.20.2"), Choice(False, "not installed")
LAPTOP = Machine(cuda=NO, transformer_engine=NO, apex=NO, wgrad=NO)
CLUSTER = Machine(cuda=YES, transformer_engine=YES, apex=YES, wgrad=YES)


def package(folder: Path, *files: str) -> None:
    for file in files:
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("raise ImportError('looking must not import')\n")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder at the head of ``sys.path``."""
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("apex", "amp_C"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    importlib.invalidate_caches()
    return tmp_path


def test_apex_of_pypi_is_rejected(site: Path) -> None:
    package(site, "apex/__init__.py", "apex/i18n/__init__.py", "apex/models.py")
    found = capabilities.probe_apex()
    assert not found.value
    assert "not NVIDIA's" in found.reason
    assert "pip uninstall apex" in found.reason


def test_apex_as_a_single_module_is_rejected(site: Path) -> None:
    package(site, "apex.py")
    assert "not NVIDIA's" in capabilities.probe_apex().reason


def test_nvidia_apex_is_accepted(site: Path) -> None:
    package(site, "apex/__init__.py", "amp_C.py")
    package(site, "apex/multi_tensor_apply/__init__.py", "apex/optimizers/__init__.py")
    assert capabilities.probe_apex() == Choice(True, "NVIDIA Apex with amp_C")


def test_nvidia_apex_without_extensions_is_rejected(site: Path) -> None:
    package(site, "apex/__init__.py")
    package(site, "apex/multi_tensor_apply/__init__.py", "apex/optimizers/__init__.py")
    found = capabilities.probe_apex()
    assert not found.value
    assert "amp_C" in found.reason


def test_no_apex(site: Path) -> None:
    assert capabilities.probe_apex() == Choice(False, "not installed")


@pytest.mark.parametrize(
    ("version", "cuda", "value", "reason"),
    [
        (None, True, False, "not installed"),
        ("1.13.0", True, False, "2.1 or newer is needed"),
        ("2.20.2+abc", False, True, "2.20.2"),
        ("2.20.2", True, False, "cannot be imported"),
    ],
)
def test_transformer_engine(
    version: str | None, cuda: bool, value: bool, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def installed(name: str) -> str:
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    def broken(name: str) -> None:
        raise OSError("libcudnn.so.9: cannot open shared object file")

    monkeypatch.setattr(importlib.metadata, "version", installed)
    monkeypatch.setattr(importlib, "import_module", broken)
    found = capabilities.probe_transformer_engine(cuda)
    assert found.value is value
    assert reason in found.reason


def test_a_laptop_uses_nothing_that_needs_a_gpu() -> None:
    chosen = capabilities.choose(LAPTOP)
    assert values(chosen) == {
        "cuda": False,
        "transformer_engine": False,
        "adam": "torch",
        "attention": "packed",
        "norm": "torch",
        "grouped_gemm": False,
        "dispatcher": "alltoall",
        "permute_fusion": False,
        "rope_fusion": False,
        "weight_gradient_fusion": True,
        "compiled_fusions": False,
    }


def test_a_cluster_uses_the_layers_of_transformer_engine() -> None:
    chosen = capabilities.choose(CLUSTER)
    assert values(chosen) == {
        "cuda": True,
        "transformer_engine": True,
        "adam": "transformer_engine",
        "attention": "transformer_engine",
        "norm": "transformer_engine",
        "grouped_gemm": True,
        "dispatcher": "alltoall",
        "permute_fusion": False,
        "rope_fusion": False,
        "weight_gradient_fusion": True,
        "compiled_fusions": True,
    }
    assert "modules of Transformer Engine 2.20.2" in chosen.transformer_engine.reason


@pytest.mark.parametrize(
    ("machine", "why"),
    [
        (LAPTOP, "Transformer Engine: not installed"),
        (dataclasses.replace(CLUSTER, transformer_engine=NO), "Transformer Engine: not installed"),
        (dataclasses.replace(CLUSTER, cuda=NO), "2.20.2 is installed, but needs CUDA"),
    ],
)
def test_without_transformer_engine_or_cuda_layers_are_megatrons_own(
    machine: Machine, why: str
) -> None:
    chosen = capabilities.choose(machine)
    assert (chosen.transformer_engine.value, chosen.attention.value) == (False, "packed")
    for choice in (chosen.transformer_engine, chosen.grouped_gemm):
        assert not choice.value
        assert why in choice.reason


NORMS, ADAM = {"patch_torch_norm", "patch_hybrid_final_norm"}, {"patch_adam"}


@pytest.mark.parametrize(
    ("machine", "mended"),
    [
        (LAPTOP, NORMS | ADAM),
        (CLUSTER, set()),
        (dataclasses.replace(CLUSTER, transformer_engine=NO), NORMS),
        (dataclasses.replace(CLUSTER, transformer_engine=NO, apex=NO), NORMS | ADAM),
        (dataclasses.replace(CLUSTER, cuda=NO), NORMS | ADAM),
    ],
)
def test_what_megatron_lacks_here_is_mended(
    machine: Machine, mended: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    noted = {p: functools.partial(done.append, p.__name__) for p in without_te.PATCHES}
    for patch, note in noted.items():
        monkeypatch.setattr(without_te, patch.__name__, note)
    monkeypatch.setattr(without_te, "PATCHES", tuple(noted.values()))
    monkeypatch.setattr(without_te, "_installed", False)
    monkeypatch.setattr(devices, "_prepared", False)
    monkeypatch.setattr(devices, "detect", lambda: capabilities.choose(machine))
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(cpu, "install", lambda: None)
    monkeypatch.delitem(sys.modules, "megatron.core", raising=False)
    devices.prepare_device()
    always = {patch.__name__ for patch in noted} - NORMS - ADAM
    assert set(done) == always | mended


def test_packages_without_a_device_are_not_used() -> None:
    chosen = capabilities.choose(dataclasses.replace(CLUSTER, cuda=NO))
    assert values(chosen) == values(capabilities.choose(LAPTOP))
    assert "needs CUDA" in chosen.weight_gradient_fusion.reason
    assert "need CUDA" in chosen.adam.reason


def test_who_adds_weight_gradients_to_their_buffer() -> None:
    bare = dataclasses.replace(CLUSTER, wgrad=Choice(False, "no kernel"))
    by = {
        machine: capabilities.choose(machine).weight_gradient_fusion
        for machine in (LAPTOP, CLUSTER, bare, dataclasses.replace(CLUSTER, transformer_engine=NO))
    }
    assert all(choice.value for choice in by.values())
    assert [choice.reason for choice in by.values()] == [
        "torch's own matrix product, not installed",
        "Transformer Engine's modules do it; the output layer: NVIDIA Apex, 2.20.2",
        "Transformer Engine's modules do it; the output layer: torch's own matrix product, "
        "no kernel",
        "NVIDIA Apex, 2.20.2",
    ]


def test_apex_gives_adam_where_transformer_engine_is_missing() -> None:
    machine = dataclasses.replace(CLUSTER, transformer_engine=NO)
    assert capabilities.choose(machine).adam.value == "apex"
    machine = dataclasses.replace(machine, apex=NO)
    assert capabilities.choose(machine).adam.value == "torch"


def test_every_choice_has_a_reason() -> None:
    for machine in (LAPTOP, CLUSTER):
        chosen = capabilities.choose(machine)
        for field in dataclasses.fields(chosen):
            assert getattr(chosen, field.name).reason


def test_flags_are_fields_of_megatron() -> None:
    from unimoe_mcore.runtime.devices import prepare_device

    prepare_device()
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=1,
        hidden_size=8,
        num_attention_heads=1,
        **transformer_flags(capabilities.choose(LAPTOP)),
    )
    assert config.moe_token_dispatcher_type == "alltoall"
    assert not config.use_cpu_initialization
    known = {field.name for field in dataclasses.fields(TransformerConfig)}
    assert set(transformer_flags(capabilities.choose(CLUSTER))) <= known


def test_flags_follow_the_choices() -> None:
    laptop = transformer_flags(capabilities.choose(LAPTOP))
    cluster = transformer_flags(capabilities.choose(CLUSTER))
    changed = {name for name in laptop if laptop[name] != cluster[name]}
    assert changed == {
        "transformer_impl",
        "moe_grouped_gemm",
        "bias_activation_fusion",
        "bias_dropout_fusion",
        "cross_entropy_loss_fusion",
    }


def values(chosen: Capabilities) -> dict[str, bool | str]:
    return {field.name: getattr(chosen, field.name).value for field in dataclasses.fields(chosen)}
