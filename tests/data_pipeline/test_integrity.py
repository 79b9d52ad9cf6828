"""A folder of shards against its manifest: each way to differ is refused and named."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest

from data_pipeline.errors import DataError
from data_pipeline.shards import integrity
from data_pipeline.shards.index import Counts, load_manifest
from data_pipeline.shards.integrity import VERIFIED_NAME, verify, write_manifest
from data_pipeline.shards.schema import Sample, Turn
from data_pipeline.shards.writer import ShardWriter


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for split, answers in (("train", "aaab"), ("test", "ab")):
        with ShardWriter(tmp_path / split / "ds", "ds", "text", max_samples=2) as writer:
            for index, answer in enumerate(answers):
                said = (Turn("human", "?"), Turn("gpt", answer))
                writer.write(Sample(f"{split}-{index}", "ds", said), {})
    write_manifest(tmp_path, "test/1", seed=3, options={"small": True}, packages={"p": "1"})
    return tmp_path


def test_the_manifest_tells_what_is_there(folder: Path) -> None:
    manifest = verify(folder)
    assert (manifest.builder, manifest.seed, manifest.packages) == ("test/1", 3, {"p": "1"})
    facts = manifest.datasets["train"]["ds"]
    assert (facts.samples, facts.answers, facts.majority) == (4, 2, 0.75)
    assert manifest.splits() == ("train", "test")
    size = sum(each.json_size for shard in manifest.shards("test") for each in shard.samples)
    assert manifest.counts["test"] == {"ds": {"text": Counts(samples=2, media={}, bytes=size)}}
    shard = manifest.shards("train")[1]
    entry = manifest.entries[1]
    assert (shard.bytes, shard.sha256, shard.url) == (entry.bytes, entry.sha256, "")
    shards = manifest.shards("train", "ds")
    assert [shard.path.name for shard in shards] == ["ds-00000.tar", "ds-00001.tar"]
    assert [each.key for shard in shards for each in shard.samples] == [
        f"train-{i}" for i in range(4)
    ]
    assert manifest == load_manifest(folder)
    with pytest.raises(DataError, match="holds no val/ds; it holds test/ds, train/ds"):
        manifest.shards("val", "ds")


def test_a_mirror_of_a_set_that_is_elsewhere_has_indexes_only(folder: Path) -> None:
    digest = load_manifest(folder).digest
    edited(folder, url="s3://there/set")
    for tar in folder.rglob("*.tar"):
        tar.unlink()
    manifest = verify(folder)
    assert (manifest.url, manifest.digest) == ("s3://there/set", digest)
    assert manifest.shards("train")[1].url == f"s3://there/set/{SHARD}"
    moved = dataclasses.replace(manifest, url="http://here")
    assert moved.shards("train")[1].url == f"http://here/{SHARD}"
    flip(folder / INDEX)
    with pytest.raises(DataError, match=f"index .*{INDEX} is corrupted"):
        verify(folder)


def test_the_digest_names_the_data(folder: Path) -> None:
    before = load_manifest(folder).digest
    write_manifest(folder, "other", seed=9)
    assert load_manifest(folder).digest == before
    with ShardWriter(folder / "val" / "ds", "ds", "text") as writer:
        writer.write(Sample("v", "ds", (Turn("human", "?"), Turn("gpt", "a"))), {})
    assert write_manifest(folder, "test/1").digest != before


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[600] ^= 1
    before = path.stat()
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1_000_000))


SHARD = "train/ds/ds-00001.tar"
INDEX = "train/ds/ds-00001.index"


@pytest.mark.parametrize("seen_before", [False, True])
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: (f / SHARD).unlink(), f"shard .*{SHARD} is missing"),
        (lambda f: (f / INDEX).unlink(), f"index .*{INDEX} is missing"),
        (lambda f: flip(f / SHARD), f"shard .*{SHARD} is corrupted"),
        (lambda f: os.truncate(f / SHARD, 5000), f"shard .*{SHARD} has 5000 bytes instead of"),
        (
            lambda f: (f / INDEX).write_bytes(
                (f / INDEX).read_bytes().replace(b"train-2", b"train_2")
            ),
            f"index .*{INDEX} is corrupted",
        ),
        (
            lambda f: (f / INDEX).write_bytes((f / INDEX).read_bytes() + b"{}"),
            f"index .*{INDEX} has",
        ),
    ],
)
def test_damage_is_refused_and_named(folder: Path, damage, words: str, seen_before: bool) -> None:
    if seen_before:
        verify(folder)
    damage(folder)
    with pytest.raises(DataError, match=words):
        verify(folder)


def test_an_unchanged_file_is_read_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    real = integrity.file_sha256
    monkeypatch.setattr(integrity, "file_sha256", lambda path: read.append(path) or real(path))
    verify(folder)
    assert len(read) == 6  # 3 shards, 3 indexes
    verify(folder)
    assert len(read) == 6
    os.utime(folder / SHARD)
    verify(folder)
    assert read[6:] == [folder / SHARD]


def test_a_damaged_memory_is_forgotten(folder: Path) -> None:
    for nonsense in ("{", "[]", '{"train/ds/ds-00001.tar": 3}'):
        (folder / VERIFIED_NAME).write_text(nonsense)
        verify(folder)
        assert len(json.loads((folder / VERIFIED_NAME).read_text())) == 6


def edited(folder: Path, **changes: object) -> None:
    path = folder / "manifest.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, **changes}))


def test_manifests_that_are_refused(folder: Path) -> None:
    path = folder / "manifest.json"
    good = path.read_text()
    shard = json.loads(good)["shards"][0]
    cases = [
        ({"version": 99}, "format 99"),
        ({"shards": [{**shard, "path": "../x.tar"}]}, "'../x.tar' is no tar inside"),
        ({"shards": [{**shard, "path": "/x.tar"}]}, "'/x.tar' is no tar inside"),
        ({"shards": [{"path": "x.tar"}]}, "is damaged"),
        ({"shards": None}, "is damaged"),
        ({"datasets": []}, "is damaged"),
        ({"counts": {"train": 3}}, "is damaged"),
    ]
    for changes, words in cases:
        edited(folder, **changes)
        with pytest.raises(DataError, match=words):
            verify(folder)
        path.write_text(good)
    for text in ("{", "[]"):
        path.write_text(text)
        with pytest.raises(DataError, match=r"manifest\.json"):
            verify(folder)
    path.unlink()
    with pytest.raises(DataError, match="does not exist; build the data set first"):
        verify(folder)


def test_an_index_with_another_number_of_samples_is_refused(folder: Path) -> None:
    record = json.loads((folder / "manifest.json").read_text())
    record["shards"][0]["samples"] = 7
    edited(folder, shards=record["shards"])
    with pytest.raises(DataError, match=r"lists 2 samples of ds \(text\) but the manifest says 7"):
        load_manifest(folder).shards("train")


def test_foreign_shards_without_index_are_indexed(folder: Path) -> None:
    before = load_manifest(folder)
    (folder / INDEX).unlink()
    (folder / "manifest.json").unlink()
    assert write_manifest(folder, "index/1").entries == before.entries


def test_an_index_that_was_there_is_held_against_the_tar(folder: Path) -> None:
    flip(folder / SHARD)
    with pytest.raises(DataError, match=r"ds-00001.tar sample 'train-2'.*or delete ds-00001.index"):
        write_manifest(folder, "index/1")


def test_a_shard_in_the_wrong_folder_is_refused(folder: Path) -> None:
    (folder / "train" / "ds").rename(folder / "train" / "other")
    with pytest.raises(DataError, match="are of dataset ds, the folder is called other"):
        write_manifest(folder, "x")
    with pytest.raises(DataError, match="has no shard named"):
        write_manifest(folder / "test" / "ds", "x")
