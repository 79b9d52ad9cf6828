from __future__ import annotations

import importlib.metadata
import re

import pytest

from unimoe_mcore import doctor
from unimoe_mcore.runtime.capabilities import Choice


def test_this_machine_is_ready(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main() == 0
    report = capsys.readouterr().out
    assert "mixture of experts      trains                9 gradients" in report
    assert "transformer engine      no                    layers are built of Megatron's" in report
    assert "attention               packed" in report
    assert "dispatcher              alltoall" in report
    assert re.search(r"^  precision +(fp32|bf16) +\S.*'auto' takes it$", report, re.MULTILINE)
    assert report.endswith("Ready.\n")


def test_a_missing_package_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    installed = importlib.metadata.version

    def version(name: str) -> str:
        if name == "psutil":
            raise importlib.metadata.PackageNotFoundError(name)
        return "0.20.0" if name == "megatron-core" else installed(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert doctor.main() == 1
    marked = [line for line in capsys.readouterr().out.splitlines() if line.startswith("! ")]
    assert [line.split()[1] for line in marked] == ["megatron-core", "psutil"]
    assert "megatron-core==0.19.2" in marked[0]


def test_the_wrong_apex_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = Choice(False, "the package named apex is not NVIDIA's; remove it")
    monkeypatch.setattr("unimoe_mcore.runtime.capabilities.probe_apex", lambda: wrong)
    assert [f.subject for f in doctor.look_at_kernels() if not f.good] == ["apex"]


def test_a_failed_self_test_is_told_not_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> int:
        raise RuntimeError("no route to host")

    monkeypatch.setattr(doctor, "_train_small_mixture", fail)
    (finding,) = doctor.run_self_test()
    assert not finding.good
    assert finding.reason == "RuntimeError: no route to host"
