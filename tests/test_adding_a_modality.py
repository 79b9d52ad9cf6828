"""The worked example of docs/adding_a_modality.md: its files and commands, as they stand there."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.workspace import build_data, overrides

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "adding_a_modality.md"


def added() -> dict[str, str]:
    """The page's files: path -> text; each block says in its first line where it goes."""
    blocks = re.findall(r"^```(?:python|yaml)\n# (\S+)\n(.*?)^```", PAGE.read_text(), re.M | re.S)
    return dict(blocks)


def commands() -> list[list[str]]:
    """The page's commands, as words."""
    (block,) = re.findall(r"^```bash\n(.*?)^```", PAGE.read_text(), re.M | re.S)
    return [shlex.split(line) for line in block.splitlines()]


class Tree:
    """A copy of the source tree with the page's files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for part in ("data_pipeline", "unimoe_mcore", "recipes"):
            shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("*.pyc"))
        self.before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for name, text in added().items():
            assert not (folder / name).exists()
            (folder / name).write_text(text)

    def run(self, words: list[str], *more: str) -> str:
        """Type a command of the page; return what it prints."""
        environment = os.environ | {"PYTHONPATH": str(self.folder), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, *words[1:], *more],
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        self.refused = done.stderr if done.returncode else ""
        return done.stdout if done.returncode == 0 else ""


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    """The tree, its data, base and stage 1 of the page's commands, in the tests' small world."""
    tree = Tree(tmp_path_factory.mktemp("heat"))
    build_data(tree.folder / "data" / "tiny")
    make, inspect, base, stage1, _ = commands()
    tree.run(make)
    assert not tree.refused
    assert "60 heat" in tree.run(inspect)
    learning = ["trainer.lr=0.02", "trainer.validation.every=0"]
    for words, more in ((base, ["trainer.steps=60"]), (stage1, [])):
        said = {each.partition("=")[0].strip("+~") for each in words + more + learning}
        mine = [each for each in overrides(tree.folder) if each.partition("=")[0] not in said]
        tree.run(words, *mine, *more, *learning)
        assert not tree.refused, tree.refused
    return tree


def test_nothing_is_edited(tree: Tree) -> None:
    for path, content in tree.before.items():
        assert path.read_bytes() == content


def test_it_trains(tree: Tree) -> None:
    run = tree.folder / "runs" / "heat" / "stage1"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 60
    losses = [line["loss/heat"] for line in lines]
    # The base has never said left or right, and is frozen: only so far can a connector move it.
    assert np.mean(losses[-5:]) < losses[0] - 1
    assert all(line["grad_norm"] > 0 for line in lines)  # of connectors: nothing else trains
    # Twelve samples, each with 16 tokens of its picture and fewer than 32 of text.
    assert all(12 * 16 < line["tokens"] < 12 * 48 for line in lines)
    parameters = json.loads((run / "parameters.json").read_text())
    assert parameters["trained_parts"]["connector.heat"] > 0
    records = (run / "evaluation").rglob("*.jsonl")
    assert any('"group": "heat"' in file.read_text() for file in records)


def test_it_is_asked(tree: Tree) -> None:
    ask = commands()[-1]
    found = json.loads(tree.run(ask, "--json", "--max-tokens", "4").splitlines()[-1])
    assert not tree.refused
    assert found
    assert "--heat FILE" in tree.run([*ask[:3], "--help"])
    np.save(tree.folder / "long.npy", np.zeros((2, 2, 2), np.float32))
    tree.run([each.replace("data/heat/warm.npy", "long.npy") for each in ask])
    assert re.search(
        r"error: long.npy .*it is float32 \(2, 2, 2\), not float32 \[h, w\]", tree.refused
    )


def test_a_base_without_its_marker_says_so(tree: Tree) -> None:
    """One that trained before the modality was added."""
    gives = tree.folder / "runs" / "heat" / "base" / "gives" / "tokenizer.json"
    from data_pipeline.conversation.tokenizer import TextTokenizer

    TextTokenizer.train(["left right"], 300).save(tree.folder / "old.json")
    assert "<heat>" in gives.read_text()
    asked = (
        "from pathlib import Path\n"
        "from data_pipeline.conversation.template import render\n"
        "from data_pipeline.conversation.tokenizer import TextTokenizer\n"
        "old = TextTokenizer.load(Path('old.json'))\n"
        "render([{'from': 'human', 'value': '<heat>?'}], old, {'heat': [16]})\n"
    )
    tree.run(["python", "-c", asked])
    assert "the base's tokenizer is older than <heat>" in tree.refused
