"""The catalogue: counted as by hand, kept, repaired, shared by processes, lazy."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.synthetic import write_catalogue
from data_pipeline.conversation.template import text_tokens
from data_pipeline.conversation.tokenizer import TextTokenizer
from data_pipeline.errors import DataError
from data_pipeline.modalities import MODALITIES
from data_pipeline.planning import catalogue as catalogue_module
from data_pipeline.planning.catalogue import Catalogue, open_catalogue
from data_pipeline.planning.plan import GlobalPlan, Mixture
from data_pipeline.reading.records import RecordReader
from data_pipeline.shards.index import index_path, load_manifest
from data_pipeline.shards.integrity import write_manifest
from tests.data_pipeline.shard_samples import foreign, members_of
from tests.workspace import DATASETS, build_data


@dataclass(frozen=True)
class Rule:
    """Tokens and work that tell all modalities and durations apart."""

    name: str = "test-1"
    factor: int = 3

    def tokens(self, modality: str, duration_ms: int) -> int:
        return self.factor * (MODALITIES.index(modality) + 1) + duration_ms // 100

    def work(self, modality: str, duration_ms: int) -> float:
        return MODALITIES.index(modality) + 1 + duration_ms / 1000


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny world, and in it a dataset of several combinations in one shard."""
    folder = build_data(tmp_path_factory.mktemp("world") / "set")
    kinds = [("image",), (), ("speech", "image"), (), ("video",)]
    members = [m for i, kind in enumerate(kinds) for m in members_of(f"m{i}", kind)]
    foreign(folder / "train" / "d" / "0.tar", members)
    write_manifest(folder, "tests/1")
    return folder


@pytest.fixture
def folder(built: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return shutil.copytree(built, tmp_path / "set")


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return TextTokenizer.train(["Which colour? red green blue pitch voice"] * 20, 300)


EVERY = [*DATASETS, "d"]
Opener = Callable[..., Catalogue]


@pytest.fixture
def opened(folder: Path, tmp_path: Path, tokenizer: TextTokenizer) -> Opener:
    def open_again(
        rule: Rule = Rule(), names: list[str] = EVERY, texts: TextTokenizer = tokenizer
    ) -> Catalogue:
        manifest = load_manifest(folder)
        return open_catalogue(manifest, "train", names, texts, rule, tmp_path / "cache")

    return open_again


def assert_counted(catalogue: Catalogue, tokenizer: TextTokenizer, rule: Rule) -> None:
    """Every row is what counting the sample by itself gives."""
    reader, row = RecordReader(), 0
    for number, source in enumerate(catalogue.sources):
        for _ in range(source.count):
            shard, sample = catalogue.entry(row)
            assert (shard.dataset, shard.combination) == (source.dataset, source.combination)
            turns = reader.record(shard, sample)["conversations"]
            tokens, work = text_tokens(turns, tokenizer), np.zeros(len(MODALITIES), np.float64)
            for medium in sample.media:
                tokens += rule.tokens(medium.modality, medium.duration_ms)
                place = MODALITIES.index(medium.modality)
                work[place] += rule.work(medium.modality, medium.duration_ms)
            assert catalogue.tokens[row] == tokens
            assert catalogue.work[row] == pytest.approx(work)
            assert catalogue.source_of(np.array([row])).tolist() == [number]
            row += 1
    assert row == len(catalogue)


def test_it_is_what_counting_every_sample_gives(opened: Opener, tokenizer: TextTokenizer) -> None:
    catalogue = opened()
    assert_counted(catalogue, tokenizer, Rule())
    found = {(source.dataset, source.combination): source.count for source in catalogue.sources}
    assert found[("d", "mixed")] == 5
    assert found[("img_group", "image+text")] == 24
    assert catalogue.combinations == sorted({c for _, c in found})
    for source, number in zip(catalogue.sources, catalogue.combination, strict=True):
        assert catalogue.combinations[number] == source.combination
    # The order of the sources is the recipe's.
    assert [source.dataset for source in opened(names=["twins", "vid_dir"]).sources] == [
        "twins",
        "vid_dir",
    ]


def test_lengths_are_those_of_the_tokenizer_and_template_that_ask(
    opened: Opener, tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All in one cache: what one tokenizer counted must not be taken for another's."""
    other = TextTokenizer.train(["unrelated words of some other text"] * 20, 270)
    first = opened()
    assert_counted(opened(texts=other), other, Rule())
    assert first.tokens.tolist() == opened().tokens.tolist()
    assert first.tokens.tolist() != opened(texts=other).tokens.tolist()
    monkeypatch.setattr(tokenizer, "template", replace(tokenizer.template, name="another"))
    asked: list[object] = []
    monkeypatch.setattr(catalogue_module, "text_tokens", lambda *a: asked.append(a) or 7)
    assert len(opened()) == len(asked)


def test_rows_of_a_plan(opened: Opener) -> None:
    catalogue = opened()
    plan = GlobalPlan(catalogue.sources, Mixture(dict.fromkeys(EVERY, 1.0), len(catalogue)))
    draws = plan.step(0)
    rows = catalogue.rows(draws)
    assert (catalogue.source_of(rows) == draws.source).all()
    assert (rows - catalogue.starts[draws.source] == draws.row).all()


def test_nothing_is_counted_twice(opened: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    first = opened()

    def counted(*_: object) -> None:
        raise AssertionError("a record was read again")

    monkeypatch.setattr(RecordReader, "record", counted)
    assert opened().folder == first.folder
    # Another rule: other columns, but the texts are those that were counted.
    other = opened(Rule("test-2", 5))
    assert other.folder != first.folder
    media = first.work.astype(bool).any(axis=1)
    assert (other.tokens[media] > first.tokens[media]).all()
    assert (other.tokens[~media] == first.tokens[~media]).all()
    assert len(opened(names=["twins"])) == 24


@pytest.mark.parametrize("damage", ["cut", "empty", "noise", "shape", "type", "huge"])
def test_damaged_counts_are_counted_again(
    opened: Opener, tokenizer: TextTokenizer, damage: str
) -> None:
    before = opened()
    tokens = before.tokens.tolist()
    kept = sorted((before.folder.parent.parent / "lengths").rglob("*.npy"))
    assert kept
    for path in kept:
        data = path.read_bytes()
        spoilt = {"cut": data[:-3], "empty": b"", "noise": bytes(200)}
        if damage in spoilt:
            path.write_bytes(spoilt[damage])
        elif damage == "shape":
            np.save(path, np.zeros(3, np.int32))
        elif damage == "type":
            np.save(path, np.zeros(len(np.load(path)), np.float32))
        else:
            path.write_bytes(data.replace(b"'shape': (", b"'shape': (99999999999999", 1))
    again = opened(Rule("test-2"))
    assert again.tokens.tolist() == tokens
    assert_counted(again, tokenizer, Rule())


@pytest.mark.parametrize("name", ["catalogue.json", "tokens.npy", "work.npy"])
@pytest.mark.parametrize("damage", ["cut", "empty", "gone", "other"])
def test_a_damaged_catalogue_is_made_again(opened: Opener, name: str, damage: str) -> None:
    first = opened()
    tokens, path = first.tokens.tolist(), first.folder / name
    data = path.read_bytes()
    path.unlink()  # what is mapped stays as it is
    other = b"{}" if name.endswith("json") else b"\x93NUMPY\x01\x00v\x00{'descr': 3}"
    if damage != "gone":
        path.write_bytes({"cut": data[: len(data) // 2], "empty": b"", "other": other}[damage])
    with pytest.raises(DataError, match="delete that folder"):
        Catalogue.load(first.folder)
    assert opened().tokens.tolist() == tokens
    assert first.tokens.tolist() == tokens


def test_a_compilation_that_was_killed_is_begun_again(opened: Opener) -> None:
    first = opened()
    tokens = first.tokens.tolist()
    first.folder.rename(first.folder.with_name(f".{first.folder.name}.partial"))
    (first.folder.with_name(f".{first.folder.name}.partial") / "tokens.npy").write_bytes(b"half")
    assert opened().tokens.tolist() == tokens


def test_changed_shards_are_another_catalogue(
    folder: Path, opened: Opener, tokenizer: TextTokenizer
) -> None:
    first = opened()
    tar = folder / "train" / "d" / "0.tar"
    foreign(tar, [*members_of("n0", ("image",)), *members_of("n1", ())])
    index_path(tar).unlink()
    write_manifest(folder, "tests/1")
    second = opened()
    assert second.folder != first.folder
    assert len(second) == len(first) - 3
    assert second.sources[:-1] == first.sources[:-1]
    assert second.sources[-1].name != first.sources[-1].name
    assert_counted(second, tokenizer, Rule())


def test_a_shard_that_is_gone_is_named_and_not_counted_as_nothing(
    folder: Path, opened: Opener
) -> None:
    tar = folder / "train" / "d" / "0.tar"
    tar.rename(tar.with_suffix(".away"))
    with pytest.raises(DataError, match=r"d/0\.tar"):
        opened()
    tar.with_suffix(".away").rename(tar)
    assert opened().tokens.min() > 0


@pytest.mark.parametrize(
    "record",
    [b'{"conversations": 5}', b'{"conversations": [{"from": "human", "value": 3}]}', b"{}"],
)
def test_a_sample_that_makes_no_sense_stops_nobody(
    folder: Path, opened: Opener, monkeypatch: pytest.MonkeyPatch, record: bytes
) -> None:
    """Whoever reads it finds it broken; here its text counts as none."""
    true = RecordReader.record

    def spoilt(reader: RecordReader, shard, sample) -> object:  # type: ignore[no-untyped-def]
        return json.loads(record) if sample.key == "m1" else true(reader, shard, sample)

    monkeypatch.setattr(RecordReader, "record", spoilt)
    tokens = opened(names=["d"]).tokens
    assert tokens[1] == 0
    assert (tokens[[0, 2, 3, 4]] > 0).all()


def test_what_is_not_there_is_said(opened: Opener) -> None:
    with pytest.raises(DataError, match=r"no train data for nowhere \(it has aud_drum.*data\.data"):
        opened(names=["twins", "nowhere"])


def test_it_pickles_as_its_folder(opened: Opener) -> None:
    catalogue = opened()
    data = pickle.dumps(catalogue)
    assert len(data) < 1000
    again = pickle.loads(data)
    assert again.sources == catalogue.sources
    assert (again.tokens == catalogue.tokens).all()
    assert again.entry(40) == catalogue.entry(40)


_OPENS = """
import sys, time
from pathlib import Path
from data_pipeline.conversation.tokenizer import TextTokenizer
from data_pipeline.planning.catalogue import open_catalogue
from data_pipeline.shards.index import load_manifest
from tests.data_pipeline.test_catalogue import EVERY, Rule
folder, cache, tokenizer = map(Path, sys.argv[1:])
print("ready", flush=True)
sys.stdin.readline()
found = open_catalogue(
    load_manifest(folder), "train", EVERY, TextTokenizer.load(tokenizer), Rule(), cache
)
print(found.folder, found.tokens.sum())
"""


def test_processes_that_begin_at_once_share_one_catalogue(
    folder: Path, tmp_path: Path, opened: Opener, tokenizer: TextTokenizer
) -> None:
    tokenizer.save(tmp_path / "tokenizer.json")
    command = [sys.executable, "-c", _OPENS, str(folder), str(tmp_path / "cache")]
    command.append(str(tmp_path / "tokenizer.json"))
    pipe = subprocess.PIPE
    processes = [
        subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env={**os.environ})
        for _ in range(3)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    printed = {process.communicate(timeout=120)[0] for process in processes}
    assert all(process.returncode == 0 for process in processes)
    mine = opened()
    assert printed == {f"{mine.folder} {mine.tokens.sum()}\n"}
    left = [path.name for path in (tmp_path / "cache").rglob("*") if "partial" in path.name]
    assert not left


_LAZY = """
import sys
from pathlib import Path
import numpy as np
from data_pipeline.planning.catalogue import Catalogue
from data_pipeline.planning.plan import GlobalPlan, Mixture
from data_pipeline.planning.work import step_work
from benchmarks.synthetic import UNIMOE_7B

def anonymous():
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024

before = anonymous()
catalogue = Catalogue.load(Path(sys.argv[1]))
plan = GlobalPlan(catalogue.sources, Mixture({s.dataset: 1.0 for s in catalogue.sources}, 512))
for step in (0, 5, 1_000_000):
    step_work(catalogue, catalogue.rows(plan.step(step)), UNIMOE_7B)
print(len(catalogue), anonymous() - before, catalogue.tokens.nbytes + catalogue.work.nbytes)
"""


def test_a_million_samples_are_mapped_and_not_read(tmp_path: Path) -> None:
    write_catalogue(tmp_path / "catalogue", 1_000_000)
    command = [sys.executable, "-c", _LAZY, str(tmp_path / "catalogue")]
    rows, grown, size = map(int, subprocess.check_output(command, text=True).split())
    assert rows == 1_000_000
    assert size == 20_000_000
    assert grown < size // 4
