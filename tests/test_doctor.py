from __future__ import annotations

import importlib.metadata
import json
import re
from dataclasses import fields

import pytest

from unimoe_mcore import doctor
from unimoe_mcore.runtime.capabilities import Capabilities, Choice


def test_this_machine_is_ready(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main() == 0
    report = capsys.readouterr().out
    rows = {line[:27].strip(): line[27:].split("  ")[0].strip() for line in report.splitlines()}
    assert rows["mixture of experts"] == "trains"
    assert rows["layers"] == "Megatron"
    assert rows["attention"] == "packed"
    assert rows["norm"] == rows["optimizer, AdamW of"] == "torch"
    assert rows["token dispatcher"] == "alltoall"
    assert rows["number format"] in ("fp32", "bf16")
    assert max(len(line) for line in report.splitlines()) <= 80
    missing = report.partition("Missing, and how to get it\n")[2]
    assert re.search(r"transformer-engine +optional +see requirements-gpu.txt\n", missing)
    assert report.endswith("\nTraining can run here.\n")


def test_every_choice_is_told() -> None:
    assert {name for name, _ in doctor.KERNELS} == {f.name for f in fields(Capabilities)}


def test_a_program_reads_the_same(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "run_self_test", lambda: [doctor.Finding("process group", "works")])
    assert doctor.main(["--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["ready"], report["verdict"]) == (True, "Training can run here.")
    doctor.main()
    words = capsys.readouterr().out
    for section in ("machine", "packages", "kernels", "self-test"):
        assert section.capitalize() in words
        for finding in report[section]:
            assert finding["good"]
            assert finding["subject"] in words
            assert finding["value"].partition(" GiB")[0] in words or section == "machine"
    assert doctor.main(["--jason"]) == 2


def test_a_missing_package_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    installed = importlib.metadata.version

    def version(name: str) -> str:
        if name in ("psutil", "wandb"):
            raise importlib.metadata.PackageNotFoundError(name)
        return {"megatron-core": "0.20.0", "numpy": "1.0"}.get(name) or installed(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert doctor.main() == 1
    report = capsys.readouterr().out
    assert re.findall(r"^! (\S+)", report, re.MULTILINE) == ["megatron-core", "psutil"]
    assert re.search(r"numpy +1.0 +tested with \d", report)
    assert re.search(r"wandb +optional +pip install wandb", report)
    assert " ".join(report.split("\n\n")[-1].split()) == (
        "Training cannot run here: megatron-core 0.20.0 (pip install megatron-core==0.19.2); "
        "psutil is missing (pip install -r requirements.txt)."
    )


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
