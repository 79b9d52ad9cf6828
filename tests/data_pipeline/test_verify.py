"""``python -m data_pipeline.verify``: every problem is listed, with shard, sample, member, byte."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline.shards.index import ShardIndex, index_path, load_manifest
from data_pipeline.shards.integrity import write_manifest
from data_pipeline.verify import find_problems, main
from tests.data_pipeline.shard_samples import foreign, make, members_of, write

SHARDS = 3


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "set"
    samples = [make(f"k{i}", ("image", "speech")) for i in range(4 * SHARDS)]
    write(folder / "train" / "d", samples, max_samples=4)
    write_manifest(folder, "test/1")
    return folder


@pytest.fixture
def shards(folder: Path) -> list[ShardIndex]:
    return load_manifest(folder).shards("train")


def flip(path: Path, place: int) -> None:
    with path.open("r+b") as stream:
        stream.seek(place)
        byte = stream.read(1)[0]
        stream.seek(place)
        stream.write(bytes([byte ^ 1]))


def found(folder: Path, quick: bool = False) -> list[str]:
    return [problem.replace(str(folder) + "/", "") for problem in find_problems(folder, quick)]


def test_a_whole_set_has_no_problem(folder: Path, capsys) -> None:
    for quick in ([], ["--quick"]):
        assert main([str(folder), *quick]) == 0
        assert f"{SHARDS} shards" in capsys.readouterr().out
    assert found(folder) == found(folder, quick=True) == []


def test_every_damaged_byte_is_placed(folder: Path, shards: list[ShardIndex]) -> None:
    first, second = shards[0].samples[1], shards[1].samples[2]
    sound = second.media[1]
    flip(shards[0].path, first.json_offset)
    flip(shards[1].path, second.media[0].offset + second.media[0].size - 1)
    flip(shards[1].path, sound.offset - 512)
    flip(shards[1].path, sound.offset + 50)
    name, other = (f"train/d/{shard.path.name}" for shard in shards[:2])
    picture = second.media[0]
    damaged = "is damaged, bytes {} to {} do not have the CRC-32 of the index"
    assert found(folder) == [
        f"{name}: sample 'k1': member k1.json "
        + damaged.format(first.json_offset, first.json_offset + first.json_size),
        f"{other}: sample 'k6': member k6.0.jpg "
        + damaged.format(picture.offset, picture.offset + picture.size),
        f"{other}: sample 'k6': the tar header of k6.1.wav at byte {sound.offset - 512} is damaged",
        f"{other}: sample 'k6': member k6.1.wav "
        + damaged.format(sound.offset, sound.offset + sound.size),
    ]
    assert found(folder, quick=True) == []


def test_bytes_between_the_members_are_no_members(folder: Path, shards: list[ShardIndex]) -> None:
    flip(shards[0].path, shards[0].path.stat().st_size - 1)
    (problem,) = found(folder)
    assert "its SHA-256 is not the manifest's though every member is right" in problem


def test_a_cut_off_tar_says_what_is_lost(folder: Path, shards: list[ShardIndex]) -> None:
    tar, lost = shards[2].path, shards[2].samples[2]
    size = tar.stat().st_size
    place = lost.media[1].offset + 7
    os.truncate(tar, place)
    name = f"train/d/{tar.name}"
    assert found(folder, quick=True) == [f"{name} has {place} bytes, the manifest says {size}"]
    assert found(folder) == [
        f"{name} has {place} bytes, the manifest says {size}",
        f"{name}: is cut off at byte {place}: 2 of 4 samples are lost, the first is 'k10' whose "
        f"member k10.1.wav begins at byte {place - 7}",
    ]
    last = max(each.json_offset + each.json_size for each in shards[1].samples)
    os.truncate(shards[1].path, last)
    assert (
        f"is cut off at byte {last}, after its last sample: no sample is lost" in found(folder)[1]
    )


def test_every_file_that_is_not_in_its_place_is_listed(
    folder: Path, shards: list[ShardIndex]
) -> None:
    tars = [shard.path for shard in shards]
    indexes = [index_path(tar) for tar in tars]
    tars[0].unlink()
    indexes[1].unlink()
    indexes[2].write_bytes(indexes[0].read_bytes())
    foreign(folder / "train" / "d" / "stray.tar", members_of("z"))
    foreign(folder / "train" / "e" / "x.tgz", members_of("z"), "w:gz")
    problems = found(folder)
    expected = [
        r"d-00000\.tar is missing",
        r"d-00001\.index does not exist; index the shard again",
        r"d-00002\.index is not the index that the manifest names: its SHA-256 differs",
        r"d-00002\.tar: does not fit its index: \d+ of 12 members are not where",
        r"stray\.tar is not in the manifest",
        r"x\.tgz is compressed",
    ]
    assert len(problems) == len(expected)
    for words, problem in zip(expected, problems, strict=True):
        assert re.search(words, problem), problem
    quick = found(folder, quick=True)
    for words, problem in zip(
        ["is missing", "is missing", r"00002\.index has \d+ bytes", *expected[4:]],
        quick,
        strict=True,
    ):
        assert re.search(words, problem), problem


def test_a_manifest_that_disagrees_is_told(folder: Path) -> None:
    path = folder / "manifest.json"
    record = json.loads(path.read_text())
    record["shards"][0]["samples"] = 9
    record["shards"][1]["sha256"] = "0" * 64
    path.write_text(json.dumps(record))
    first, second = found(folder)
    assert "d-00000.index lists 4 samples of d (image+speech+text) in a tar of" in first
    assert "the manifest 9 of d" in first
    assert "d-00001.tar: its SHA-256 is not the manifest's though every member is right" in second
    path.write_text("{")
    assert ["manifest.json cannot be read" in each for each in found(folder)] == [True]


def test_media_that_nothing_can_decode_are_listed(tmp_path: Path) -> None:
    members = [
        (name, b"" if name == "a.0.jpg" else b"RIFF" if name == "a.2.wav" else data)
        for name, data in members_of("a", ("image", "video", "speech"))
    ]
    foreign(tmp_path / "train" / "d" / "x.tar", [*members_of("0"), *members])
    write_manifest(tmp_path, "index/2")
    empty, broken = found(tmp_path)
    assert re.fullmatch(r".*x.tar: sample 'a': member a.0.jpg at byte \d+ is empty", empty)
    assert re.fullmatch(r".* member a.2.wav at byte \d+ cannot be decoded, its .* broken", broken)


def test_of_a_set_that_is_elsewhere_the_indexes_are_checked(
    folder: Path, shards: list[ShardIndex]
) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "url": "s3://there"}))
    for shard in shards:
        shard.path.unlink()
    assert found(folder) == found(folder, quick=True) == []
    index_path(shards[1].path).write_bytes(b"no index")
    (problem,) = found(folder)
    assert "d-00001.index is no index or damaged" in problem


def test_the_command_ends_with_1_and_names_every_problem(
    folder: Path, shards: list[ShardIndex]
) -> None:
    flip(shards[0].path, shards[0].samples[0].json_offset)
    os.truncate(shards[1].path, 3)
    ran = subprocess.run(
        [sys.executable, "-m", "data_pipeline.verify", str(folder)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.returncode == 1
    lines = ran.stdout.splitlines()
    assert len(lines) == 3
    assert "4 of 4 samples are lost" in lines[2]
    assert f"{folder}: 3 problems" in ran.stderr
