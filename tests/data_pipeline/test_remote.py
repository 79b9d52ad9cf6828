"""Sets that lie elsewhere: mirrored, fetched, cached, by many processes, some of them killed."""

import io
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import fsspec
import pytest
from fsspec.registry import known_implementations

from data_pipeline.errors import DataError
from data_pipeline.reading import transfer
from data_pipeline.reading.records import RecordReader
from data_pipeline.reading.remote import ShardStore, open_set
from data_pipeline.shards.index import MANIFEST_NAME, ShardIndex, load_manifest
from tests.data_pipeline.published import (
    SHARDS,
    SPAWN,
    address,
    held,
    join,
    opened,
    path_of,
    same,
    start,
    write_set,
)

# --- what is read


def _memory_copy(folder: Path) -> str:
    system = fsspec.filesystem("memory")
    system.put(str(folder), "/copied/set", recursive=True)
    return "memory://copied/set"


@pytest.mark.parametrize("kind", ["http", "http to the manifest", "file", "memory", "s3"])
def test_a_set_elsewhere_is_the_set(kind, published, server, tmp_path, monkeypatch):
    server.answers_s3(monkeypatch)
    place = {
        "http": lambda: address(server) + "/",
        "http to the manifest": lambda: f"{address(server)}/{MANIFEST_NAME}",
        "file": lambda: f"file://{published}",
        "memory": lambda: _memory_copy(published),
        "s3": lambda: "s3://bucket/set",
    }[kind]()
    here, there = load_manifest(published), open_set(place, tmp_path / "sets")
    assert there.digest == here.digest
    assert there.url == place.rstrip("/").removesuffix(f"/{MANIFEST_NAME}")
    assert load_manifest(there.folder).url == there.url
    store = pickle.loads(pickle.dumps(ShardStore(tmp_path / "cache", 10**6)))
    near, far = RecordReader(), RecordReader(store)
    for mine, theirs in zip(here.shards("train"), there.shards("train"), strict=True):
        assert not theirs.path.exists()
        assert list(mine.samples) == list(theirs.samples)
        for sample in mine.samples:
            assert near.record(mine, sample) == far.record(theirs, sample)
            assert near.media(mine, sample) == far.media(theirs, sample)


def test_a_set_here_is_not_copied(published, tmp_path):
    manifest = open_set(str(published), tmp_path / "sets")
    assert (manifest.folder, manifest.url) == (published, "")
    shard = manifest.shards("train")[0]
    assert ShardStore().path(shard) == shard.path
    assert same(ShardStore(), shard)
    assert not (tmp_path / "sets").exists()


def test_addresses_that_only_gopen_knows(published, tmp_path, monkeypatch):
    program = tmp_path / "ais"  # what gopen starts for ais://
    program.write_text(f'#!/bin/sh\nexec cat "{published}${{2#ais://bucket/set}}"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    manifest = open_set("ais://bucket/set", tmp_path / "sets")
    store = ShardStore(tmp_path / "cache", 10**6)
    assert all(same(store, shard) for shard in manifest.shards("train"))
    program.write_text("#!/bin/sh\necho half; exit 3\n")
    with pytest.raises(DataError, match=r"ais://bucket/set/train/.*cannot be fetched.*4 of 4"):
        ShardStore(tmp_path / "other", 10**6).open(manifest.shards("train")[0])
    monkeypatch.setattr(transfer, "SILENCE_SECONDS", 0.1)
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    with pytest.raises(DataError, match="without a byte"):
        open_set("ais://bucket/set", tmp_path / "sets")


# --- servers that fail


@pytest.mark.parametrize("fault", ["500", "503", "429", "cut", "short", "wrong"])
def test_what_may_pass_is_tried_again(fault, server, tmp_path):
    server.faults["bucket/set/manifest.json"] = [] if fault in ("short", "wrong") else [fault]
    shard = opened(server, tmp_path)[0]
    server.faults[path_of(shard)] = [fault, fault]
    assert same(ShardStore(tmp_path / "cache", 10**6), shard)
    assert server.requests[path_of(shard)] == 3


@pytest.mark.parametrize(
    ("fault", "requests", "sentence"),
    [
        ("404", 1, "there is no such file"),
        ("403", 1, "403"),
        ("more", 1, "larger than the"),
        ("500", 4, "500.*attempt 4 of 4"),
        ("short", 4, "bytes came"),
        ("wrong", 4, "SHA-256 is not the manifest's"),
        ("stall", 4, "attempt 4 of 4"),
        ("drip", 4, "bytes in"),
    ],
)
def test_what_does_not_pass_is_said(fault, requests, sentence, server, tmp_path, monkeypatch):
    monkeypatch.setattr(transfer, "SILENCE_SECONDS", 0.3)
    shard = opened(server, tmp_path)[0]
    if fault == "drip":
        monkeypatch.setattr(transfer, "PATIENCE_SECONDS", 0.0)
    server.faults[path_of(shard)] = [fault] * 9
    store = ShardStore(tmp_path / "cache", 10**6)
    with pytest.raises(DataError, match=rf"{shard.url}.*{sentence}"):
        store.path(shard)
    assert server.requests[path_of(shard)] == requests
    assert held(tmp_path / "cache") == 0


class Silent(fsspec.AbstractFileSystem):
    """A file system that stops answering at one point, and knows no limit of its own."""

    cachable = False
    stops_at = ""
    started = 0
    woken = threading.Event()

    def __init__(self, **options) -> None:
        super().__init__(**options)
        Silent.started += 1
        self.arrive("connecting")

    def open(self, path, mode="rb", **options) -> AbstractContextManager:
        self.arrive("opening")
        file = io.BytesIO(bytes(2**21))
        read = file.read

        def answer(size: int) -> bytes:
            if file.tell():
                self.arrive("reading")
            return read(size)

        return nullcontext(SimpleNamespace(read=answer))

    def arrive(self, point: str) -> None:
        if point == self.stops_at:
            self.woken.wait(60)


@pytest.mark.parametrize("point", ["connecting", "opening", "reading"])
def test_a_file_system_without_a_time_limit(point, tmp_path, monkeypatch):
    known = {"class": f"{__name__}.Silent"}
    monkeypatch.setitem(known_implementations, "silent", known)
    for name, value in {"CONNECT": 0.05, "SILENCE": 0.05, "PAUSE": 0.01}.items():
        monkeypatch.setattr(transfer, f"{name}_SECONDS", value)
    monkeypatch.setattr(transfer, "SLOWEST", 2**40)
    monkeypatch.setattr(Silent, "stops_at", point)
    monkeypatch.setattr(Silent, "started", 0)
    with pytest.raises(DataError, match=r"silent://bucket/set/.*without a byte.*attempt 4 of 4"):
        open_set("silent://bucket/set", tmp_path)
    assert Silent.started == 4
    Silent.woken.set()  # what was left behind ends
    overseen = [each for each in threading.enumerate() if each.name == "overseen read"]
    for thread in overseen:
        thread.join(5)
    assert not any(thread.is_alive() for thread in overseen)
    Silent.woken.clear()


def test_no_secret_is_printed(server, tmp_path):
    place = address(server).replace("://", "://me:secret@") + "/nothing?token=secret"
    with pytest.raises(DataError, match="bucket/set/nothing") as caught:
        open_set(place, tmp_path)
    assert "secret" not in str(caught.value)


def test_refused_addresses(tmp_path):
    bait = tmp_path / "bait"
    command = f"pipe:touch {bait} #"
    for place in (command, "simplecache::http://x/y", "data://x", "nosuch://x/y"):
        with pytest.raises(DataError):
            open_set(place, tmp_path / "sets")
    shard = ShardIndex(Path("x.tar"), "d", "text", f"{command}/x.tar", 5, "0" * 64)
    with pytest.raises(DataError, match="refused"):
        ShardStore(tmp_path / "cache", 100).open(shard)
    assert not bait.exists()


@pytest.mark.parametrize("path", ["../outside.tar", "/tmp/outside.tar", "a b.tar", "a?.tar"])
def test_a_manifest_cannot_name_other_places(path, published, tmp_path):
    folder = tmp_path / "hostile" / "set"
    shutil.copytree(published, folder)
    record = json.loads((folder / MANIFEST_NAME).read_text())
    record["shards"][0]["path"] = path
    record["url"] = "pipe:exit"
    (folder / MANIFEST_NAME).write_text(json.dumps(record))
    before = sorted((tmp_path / "hostile").rglob("*"))
    with pytest.raises(DataError, match="hostile/set: "):
        open_set(f"file://{folder}", tmp_path / "mirror" / "sets")
    assert sorted((tmp_path / "hostile").rglob("*")) == before
    assert not list(tmp_path.rglob("outside*"))


def test_reading_processes_do_not_import_torch():
    code = "import sys, data_pipeline.reading.remote; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- mirrors


def test_a_mirror_follows_its_manifest(server, published, tmp_path):
    folder = server.folder / "bucket" / "changing"
    shutil.copytree(published, folder)
    place = f"{server.url}/bucket/changing"
    first = open_set(place, tmp_path)
    again = open_set(place, tmp_path)
    assert again.folder == first.folder
    indexes = [n for p, n in server.requests.items() if p.endswith(".index")]
    assert indexes == [1] * SHARDS
    shutil.rmtree(folder)
    write_set(folder, seed=100)
    second = open_set(place, tmp_path)
    assert second.digest == load_manifest(folder).digest != first.digest
    assert first.shards("train")[0].samples[0].key == "s-0"  # whoever is at it reads on
    long_ago = time.time() - 40 * 24 * 3600
    os.utime(first.folder, (long_ago, long_ago))
    open_set(place, tmp_path)
    assert not first.folder.exists()
    shutil.rmtree(folder)


def test_a_damaged_mirror_is_mended(server, tmp_path):
    manifest = open_set(address(server), tmp_path)
    indexes = sorted(manifest.folder.rglob("*.index"))
    content = [path.read_bytes() for path in indexes]
    indexes[0].write_bytes(bytes(len(content[0])))
    indexes[1].unlink()
    indexes[2].touch()  # looks different, is the same
    server.requests.clear()
    open_set(address(server), tmp_path)
    assert [path.read_bytes() for path in indexes] == content
    assert sum(server.requests.values()) == 3  # the manifest and two indexes


def _open_and_read(place: str, sets: Path, digest: str, done) -> None:
    manifest = open_set(place, sets)
    if manifest.digest != digest or len(manifest.shards("train")) != SHARDS:
        sys.exit(1)
    done.put(0)


def test_many_processes_mirror_once_also_after_a_kill(server, published, tmp_path):
    place, digest = address(server), load_manifest(published).digest
    server.rate = 20_000
    done = SPAWN.Queue()
    killed = start(_open_and_read, place, tmp_path, digest, done)
    until = time.monotonic() + 20
    while not any(p.endswith(".index") for p in server.requests) and time.monotonic() < until:
        time.sleep(0.005)
    os.kill(killed.pid, signal.SIGKILL)
    killed.join()
    server.rate = 0
    time.sleep(0.3)  # until the server has seen the last of its requests
    server.requests.clear()
    join([start(_open_and_read, place, tmp_path, digest, done) for _ in range(4)])
    fetched = {p: n for p, n in server.requests.items() if p.endswith(".index")}
    assert list(fetched.values()) == [1] * SHARDS
    assert not list((tmp_path / "sets").glob("*.partial"))
