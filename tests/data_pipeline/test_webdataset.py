"""The same samples through other programs' readers: WebDataset's and Energon's."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from torch.utils.data import DataLoader

import data_pipeline
from data_pipeline.build import index_folder
from data_pipeline.errors import DataError
from data_pipeline.reading.records import RecordReader
from data_pipeline.shards.index import Manifest, load_manifest
from tests.data_pipeline.shard_samples import ALL, foreign, make, members_of, write
from tests.server import Server

ROOT = Path(__file__).resolve().parents[2]
Bytes = dict[str, dict[str, int]]
"""Key -> member -> CRC-32."""


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Three datasets: of our writer, of another combination, and a mixed one from elsewhere."""
    folder = tmp_path_factory.mktemp("set")
    write(folder / "train" / "d", [make(f"d{i}", ALL) for i in range(5)], max_samples=2)
    write(folder / "train" / "t", [make(f"t{i}", (), "t") for i in range(4)], max_samples=3)
    others = [make(f"m{i}", ("image",) * (i % 2), "m") for i in range(3)]
    members = [
        (f"./{sample.key}.{member}", data)
        for sample, files in others
        for member, data in {
            "json": sample.to_json(),
            "7.txt": b"not in the record",
            **files,
        }.items()
    ]
    foreign(folder / "train" / "m" / "x.tar", [*members, ("./README", b"x"), ("./m2.JPG", b"x")])
    index_folder(folder, say=lambda text: None)
    return load_manifest(folder)


def ours(manifest: Manifest, dataset: str | None = None) -> Bytes:
    """Every sample as our own reader reads it."""
    reader, found = RecordReader(), dict[str, dict[str, int]]()
    for shard in manifest.shards("train", dataset):
        for sample in shard.samples:
            media = reader.media(shard, sample)
            found[sample.key] = {
                each.member: zlib.crc32(medium.data)
                for each, medium in zip(sample.media, media, strict=True)
            }
            record = reader.record(shard, sample)
            found[sample.key]["json"] = zlib.crc32(canonical(record))
    return found


def canonical(record: object) -> bytes:
    return json.dumps(record, sort_keys=True).encode()


def crc32s(sample: dict) -> dict[str, int]:
    media = {name: zlib.crc32(sample[name]) for name in sample if name[0] in "0123456789"}
    return {**media, "json": zlib.crc32(canonical(json.loads(sample["json"])))}


@pytest.mark.parametrize("dataset", [None, "d", "t", "m"])
def test_webdataset_gives_the_same_samples(manifest: Manifest, dataset: str | None) -> None:
    names = None if dataset is None else [dataset]
    read = list(data_pipeline.as_webdataset(manifest.folder, "train", names))
    assert {each["__key__"]: crc32s(each) for each in read} == ours(manifest, dataset)
    assert [each["__key__"] for each in read] == list(ours(manifest, dataset))
    shards = {str(shard.path) for shard in manifest.shards("train", dataset)}
    assert {each["__url__"] for each in read} == shards


@pytest.mark.parametrize("scheme", ["http", "s3", "file"])
def test_a_set_elsewhere_gives_the_same_samples(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    with Server(tmp_path / "served") as server:
        shutil.copytree(manifest.folder, server.folder / "bucket" / "set")
        server.answers_s3(monkeypatch)
        place = {
            "http": f"{server.url}/bucket/set",
            "s3": "s3://bucket/set",
            "file": f"file://{server.folder}/bucket/set",
        }[scheme]
        read = list(data_pipeline.as_webdataset(place, "train", cache=tmp_path / "cache"))
    assert {each["__key__"]: crc32s(each) for each in read} == ours(manifest)
    assert all(each["__url__"].startswith(f"{place}/train/") for each in read)


def test_a_manifest_cannot_run_a_command(manifest: Manifest, tmp_path: Path) -> None:
    folder = shutil.copytree(manifest.folder, tmp_path / "set")
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "url": "pipe:touch x;"}))
    with pytest.raises(DataError, match="a set at 'pipe:' is not read through webdataset"):
        data_pipeline.as_webdataset(folder, "train")


def test_shuffling_and_workers_are_webdatasets_own(manifest: Manifest) -> None:
    shuffled = data_pipeline.as_webdataset(manifest.folder, "train", shardshuffle=100, seed=1)
    loader = DataLoader(
        shuffled.shuffle(10), batch_size=None, num_workers=2, multiprocessing_context="spawn"
    )
    read = list(loader)
    assert len(read) == 12
    assert {each["__key__"]: crc32s(each) for each in read} == ours(manifest)


def energon_python() -> Path:
    """Python of an environment that has Energon."""
    if importlib.util.find_spec("megatron.energon"):
        return Path(sys.executable)
    environment = Path(os.environ.get("UNIMOE_ENERGON", ROOT / "cache" / "energon"))
    if not (environment / "bin" / "energon").is_file():
        pytest.skip(f"{environment} has no Energon; run tests/data_pipeline/energon.sh")
    return environment / "bin" / "python"


def test_energon_reads_the_same_samples(manifest: Manifest, tmp_path: Path) -> None:
    python = energon_python()
    folder = shutil.copytree(manifest.folder, tmp_path / "set")  # Energon writes into it
    options = "--non-interactive --no-progress --num-workers 1 --sample-type CrudeWebdataset"
    prepare = [python.with_name("energon"), "prepare", folder, *options.split()]
    subprocess.run([*prepare, "--split-parts", "train:train/.*"], check=True, timeout=200)
    read = subprocess.run(
        [python, ROOT / "tests" / "data_pipeline" / "cases_energon.py", folder],
        stdout=subprocess.PIPE,
        timeout=200,
    )
    given = json.loads(read.stdout)
    expected = by_bytes(manifest)
    assert {key: {m: given[key][m] for m in expected[key]} for key in given} == expected


def by_bytes(manifest: Manifest) -> dict[str, dict[str, list[int]]]:
    """Key -> member -> [size, CRC-32] by the index, of every sample."""
    return {
        sample.key: {
            "json": [sample.json_size, sample.json_crc32],
            **{medium.member: [medium.size, medium.crc32] for medium in sample.media},
        }
        for shard in manifest.shards("train")
        for sample in shard.samples
    }


def test_what_is_not_there_is_refused(manifest: Manifest, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no val"):
        data_pipeline.as_webdataset(manifest.folder, "val")
    with pytest.raises(DataError, match="holds no train/x"):
        data_pipeline.as_webdataset(manifest.folder, "train", ["d", "x"])
    with pytest.raises(DataError, match="does not exist"):
        data_pipeline.as_webdataset(tmp_path, "train")


def test_a_sample_that_lost_a_member_is_refused(tmp_path: Path) -> None:
    members = members_of("a", ALL)
    path = foreign(tmp_path / "train" / "d" / "x.tar", members)
    index_folder(tmp_path, say=lambda text: None)
    foreign(path, [*members[:-1], ("a.4.jpg", members[-1][1])])
    with pytest.raises(DataError, match=r"x\.tar:a: 3\.jpg is missing"):
        list(data_pipeline.as_webdataset(tmp_path, "train"))


def test_importing_the_package_stays_light() -> None:
    code = (
        "import sys, data_pipeline, data_pipeline.shards.writer, data_pipeline.verify;"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        data_pipeline.nothing  # noqa: B018
