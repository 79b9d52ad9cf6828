"""The damage drill: each bad sample costs itself, each bad shard stops the run, nothing hangs."""

import io
import shutil
import struct
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from data_pipeline.errors import DataError
from data_pipeline.reading.pool import ReaderPool
from data_pipeline.reading.reader import BrokenSampleError, ReadingJob, SampleReader
from data_pipeline.reading.sample import BrokenSample, Sample
from data_pipeline.shards.index import index_path, load_manifest
from tests.data_pipeline.reading_set import (
    ROWS,
    change_index,
    job,
    medium,
    open_set,
    row,
    same,
    shard,
    tasks,
    trap,
    write,
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The set without damage; nobody may change it."""
    return write(tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def expected(whole) -> list[Sample]:
    reader = SampleReader(job(open_set(whole)))
    return [reader.read(number) for number in range(ROWS)]


@dataclass(frozen=True)
class Harm:
    """What becomes of a sample, and a word of the reason."""

    kind: str
    word: str


def read_all(found: ReadingJob, workers: int, seconds: float = 60.0) -> dict[int, object]:
    wanted = tasks()
    with ReaderPool(found, workers, seconds) as pool:
        for number, rows in wanted.items():
            pool.submit(number, rows)
        return {
            each: outcome
            for number, rows in wanted.items()
            for each, outcome in zip(rows, pool.result(number), strict=True)
        }


def assert_costs_only(
    found: ReadingJob, workers: int, harms: dict[str, Harm], expected, seconds: float = 60.0
) -> None:
    outcomes = read_all(found, workers, seconds)
    assert len(outcomes) == ROWS
    bad = {o.key: o for o in outcomes.values() if isinstance(o, BrokenSample)}
    assert {key: each.kind for key, each in bad.items()} == {k: h.kind for k, h in harms.items()}
    for key, each in bad.items():
        assert harms[key].word in each.reason
        dataset = key.partition("-")[0]
        assert (each.dataset, each.shard) == (dataset, f"{dataset}-00000.tar")
    for number, outcome in outcomes.items():
        if expected[number].key not in harms:
            assert same(outcome, expected[number])


def bomb() -> bytes:
    """A picture of 168 megapixels in some kilobytes."""
    file = io.BytesIO()
    Image.new("1", (14_000, 12_000)).save(file, "PNG")
    return file.getvalue()


def lying_wav(data: bytes, claim: int) -> bytes:
    """A WAV whose data chunk claims another size, bytes."""
    at = data.index(b"data") + 4
    return data[:at] + struct.pack("<I", claim) + data[at + 4 :]


def garbled_opus(data: bytes) -> bytes:
    """Headers of Opus and the right pages, but their packets are nothing that it knows."""
    body = bytearray(data)
    start = body.index(b"OpusTags") + 200
    for place in range(start, len(body)):
        body[place] ^= 0x5A
    return bytes(body)


FILES = {
    "pic-0": (b"", Harm("broken", "empty")),
    "pic-1": (bomb(), Harm("large", "14000 x 12000")),
    "pic-2": (medium("pic", 2)[: len(medium("pic", 2)) // 2], Harm("broken", "picture")),
    "pic-3": (b"GIF89a" + bytes(40), Harm("broken", "picture")),
    "clip-0": (b"", Harm("broken", "empty")),
    "clip-1": (medium("clip", 1)[:900], Harm("broken", "video")),
    "talk-0": (b"", Harm("broken", "empty")),
    "talk-1": (lying_wav(medium("talk", 1), 2**31 - 1), Harm("broken", "recording")),
    "talk-2": (lying_wav(medium("talk", 2), 0), Harm("broken", "recording")),
    "talk-3": (medium("talk", 3)[:-5000], Harm("broken", "recording")),
    "hum-0": (b"", Harm("broken", "empty")),
    "hum-1": (garbled_opus(medium("hum", 1)), Harm("broken", "recording")),
}


@pytest.mark.parametrize("workers", [0, 2])
def test_media_that_were_bad_when_they_were_written(whole, expected, tmp_path, workers):
    folder = write(tmp_path, {key: data for key, (data, _) in FILES.items()})
    harms = {key: harm for key, (_, harm) in FILES.items()}
    assert_costs_only(job(open_set(folder)), workers, harms, expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_damage_since_and_an_index_that_lies(whole, expected, tmp_path, workers):
    folder = shutil.copytree(whole, tmp_path / "set", ignore=shutil.ignore_patterns("cache"))
    samples = load_manifest(folder).shards("train", "pic")[0].samples
    picture, record = samples[3].media[0], samples[5]
    change_index(shard(folder, "talk"), duration_ms={4: 2500}, crc32={6: 123})
    catalogue = open_set(folder)  # the plan believes the index; then bytes flip
    with shard(folder, "pic").open("r+b") as file:
        for place in (picture.offset + picture.size // 2, record.json_offset + 7):
            file.seek(place)
            flipped = bytes([file.read(1)[0] ^ 0x40])
            file.seek(place)
            file.write(flipped)
    harms = {
        "pic-3": Harm("broken", f"pic-3.0.png from byte {picture.offset}"),
        "pic-5": Harm("broken", f"pic-5.json from byte {record.json_offset}"),
        "talk-4": Harm("inconsistent", "2500 ms"),
        "talk-6": Harm("broken", "0000007b"),
    }
    assert_costs_only(job(catalogue), workers, harms, expected)


@pytest.mark.parametrize(
    ("traps", "kinds", "workers"),
    [
        ({"talk_2": "spin"}, {"talk-2": Harm("slow", "longer")}, 0),
        (
            {"talk_2": "hang", "talk_5": "crash"},
            {"talk-2": Harm("slow", "longer"), "talk-5": Harm("crashed", "SIGSEGV")},
            2,
        ),
    ],
)
def test_decoders_that_hang_or_crash_beside_broken_media(expected, tmp_path, traps, kinds, workers):
    """What ``test_pool`` shows of each alone, here in one set with other damage."""
    files = {key: FILES[key] for key in ("pic-1", "talk-1", "hum-1")}
    folder = write(tmp_path, {key: data for key, (data, _) in files.items()})
    harms = {**{key: harm for key, (_, harm) in files.items()}, **kinds}
    assert_costs_only(job(open_set(folder), rule=trap(**traps)), workers, harms, expected, 2.0)


def _cut(folder: Path) -> None:
    tar = shard(folder, "pic")
    tar.write_bytes(tar.read_bytes()[:-3000])


def _empty(folder: Path) -> None:
    shard(folder, "pic").write_bytes(b"")


def _missing(folder: Path) -> None:
    shard(folder, "pic").unlink()


def _another(folder: Path) -> None:
    """A tar of the same size with other samples."""
    tar = shard(folder, "pic")
    whole = tar.read_bytes()
    tar.write_bytes(whole[2048:] + whole[:2048])


def _index_of_another(folder: Path) -> None:
    shutil.copy(index_path(shard(folder, "talk")), index_path(shard(folder, "pic")))


def _no_index(folder: Path) -> None:
    index_path(shard(folder, "pic")).write_bytes(b"nothing")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("harm", [_cut, _empty, _missing, _another, _index_of_another, _no_index])
def test_a_shard_that_cannot_be_trusted_stops_the_run(whole, tmp_path, harm, workers):
    folder = shutil.copytree(whole, tmp_path / "set", ignore=shutil.ignore_patterns("cache"))
    catalogue = open_set(folder)  # the plan is made; then it happens
    harm(folder)
    with ReaderPool(job(catalogue), workers, 60.0) as pool:
        pool.submit(0, [row("talk-1"), row("plain-0")])
        pool.submit(1, [row("talk-1"), row("pic-4")])
        assert [sample.key for sample in pool.result(0)] == ["talk-1", "plain-0"]
        with pytest.raises(DataError, match="pic-00000") as caught:
            pool.result(1)
        assert not isinstance(caught.value, BrokenSampleError)
