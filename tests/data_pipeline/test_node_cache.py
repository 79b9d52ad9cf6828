"""One node's cache of shards: bounded, checked, shared by many processes, some of them killed."""

import hashlib
import multiprocessing
import os
import random
import resource
import signal
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from data_pipeline.errors import DataError
from data_pipeline.reading import node_cache
from data_pipeline.reading.records import RecordReader
from data_pipeline.reading.remote import ShardStore
from data_pipeline.shards.index import ShardIndex
from tests.data_pipeline.published import (
    SHARDS,
    SPAWN,
    held,
    join,
    opened,
    path_of,
    same,
    start,
)

# --- one node's cache


def test_the_least_recently_used_goes(server, tmp_path):
    shards = opened(server, tmp_path)[:4]
    store = ShardStore(tmp_path / "cache", sum(s.bytes for s in shards[1:4]))
    for index in (0, 1, 2, 0, 3, 0, 2, 3):  # 1 goes when 3 comes
        assert same(store, shards[index])
        time.sleep(0.02)
    assert [server.requests[path_of(s)] for s in shards] == [1, 1, 1, 1]
    assert same(store, shards[1])
    assert same(store, shards[3])
    assert [server.requests[path_of(s)] for s in shards] == [1, 2, 1, 1]
    assert held(tmp_path / "cache") <= store.most_bytes


def test_what_is_thrown_out_stays_open(server, tmp_path):
    shards = opened(server, tmp_path)
    store = ShardStore(tmp_path / "cache", max(s.bytes for s in shards))
    with store.open(shards[0]) as file:
        place = store.path(shards[0])
        assert same(store, shards[1])
        assert not place.exists()
        assert hashlib.sha256(file.read()).hexdigest() == shards[0].sha256


def test_a_shard_that_does_not_fit(server, tmp_path):
    shard = opened(server, tmp_path)[0]
    with pytest.raises(DataError, match=f"single shard has {shard.bytes}"):
        ShardStore(tmp_path / "cache", shard.bytes - 1).open(shard)
    with pytest.raises(DataError, match="no folder"):
        ShardStore().open(shard)
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot be used"):
        ShardStore(tmp_path / "file" / "cache", 10**6).open(shard)
    assert server.requests[path_of(shard)] == 0


def test_a_full_disk_is_said(server, tmp_path):
    shard = opened(server, tmp_path)[0]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(DataError, match="free some space"):
            ShardStore(tmp_path / "cache", 10**6).open(shard)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert held(tmp_path / "cache") == 0
    assert same(ShardStore(tmp_path / "cache", 10**6), shard)


@pytest.mark.parametrize("how", ["written to", "unseen", "after a start", "no note", "missing"])
def test_a_damaged_copy_is_fetched_again(how, server, tmp_path, monkeypatch):
    shard = opened(server, tmp_path)[0]
    store = ShardStore(tmp_path / "cache", 10**6)
    place = store.path(shard)
    before = place.stat()
    with place.open("r+b") as file:
        file.seek(20_000)
        file.write(b"damage")
    if how in ("unseen", "after a start"):
        os.utime(place, ns=(before.st_atime_ns, before.st_mtime_ns))
    if how == "after a start":
        monkeypatch.setattr(node_cache, "boot", lambda: "another boot")
    if how == "no note":
        Path(f"{place}.checked").unlink()
    if how == "missing":
        place.unlink()
    if how == "unseen":
        assert not same(store, shard)
        reader = RecordReader(store)
        assert reader.media(shard, shard.samples[0])  # finds the member damaged, then mended
    assert same(store, shard)
    assert server.requests[path_of(shard)] == 2


def test_a_right_copy_is_kept(server, tmp_path, monkeypatch):
    shard = opened(server, tmp_path)[0]
    store = ShardStore(tmp_path / "cache", 10**6)
    store.path(shard)
    store.forget(shard)
    monkeypatch.setattr(node_cache, "boot", lambda: "another boot")
    assert same(store, shard)
    assert server.requests[path_of(shard)] == 1


# --- many processes


def _read_many(store: ShardStore, shards: list[ShardIndex], seed: int, rounds: int, done) -> None:
    rng = random.Random(seed)
    for _ in range(rounds):
        if not same(store, rng.choice(shards)):
            sys.exit(1)
    done.put(seed)


def test_one_process_fetches_while_others_wait(server, tmp_path):
    shard = opened(server, tmp_path)[0]
    server.rate = 4 * shard.bytes  # a quarter of a second
    store, done = ShardStore(tmp_path / "cache", 10**6), SPAWN.Queue()
    join([start(_read_many, store, [shard], seed, 3, done) for seed in range(4)])
    assert server.requests[path_of(shard)] == 1


def test_many_processes_share_a_cache_that_is_too_small(server, tmp_path):
    shards = opened(server, tmp_path)
    server.rate = 10_000_000
    store = ShardStore(tmp_path / "cache", 3 * max(s.bytes for s in shards))
    most, watching = 0, True

    def watch() -> None:
        nonlocal most
        while watching:
            if (tmp_path / "cache" / "files").exists():
                most = max(most, held(tmp_path / "cache"))
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    done = SPAWN.Queue()
    processes = [start(_read_many, store, shards, seed, 40, done) for seed in range(5)]
    try:
        join(processes)
    finally:
        watching = False
        watcher.join()
    # Seen one file after the other, a file that leaves while another comes may count twice.
    assert 0 < most <= store.most_bytes + max(s.bytes for s in shards)
    assert held(tmp_path / "cache") <= store.most_bytes
    assert not list((tmp_path / "cache" / "files").glob("*.partial"))
    assert len(list((tmp_path / "cache" / "locks").iterdir())) <= SHARDS + 1


def test_killed_processes_leave_nothing_in_the_way(server, tmp_path):
    shards = opened(server, tmp_path)
    server.rate = 1_000_000  # 50 ms a shard
    store = ShardStore(tmp_path / "cache", 3 * max(s.bytes for s in shards))
    rng, done = random.Random(7), SPAWN.Queue()
    seen = Counter[str]()
    for seed in range(6):
        process = start(_read_many, store, shards, seed, 10_000, done)
        until = time.monotonic() + 20
        while not (server.requests - seen) and time.monotonic() < until:
            time.sleep(0.005)
        time.sleep(rng.random() * 0.15)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        seen = server.requests.copy()
    server.rate = 0
    assert all(same(store, shard) for shard in shards)
    assert held(tmp_path / "cache") <= store.most_bytes
    assert not list((tmp_path / "cache" / "files").glob("*.partial"))


def test_a_process_may_fork_after_it_has_fetched(server, tmp_path):
    shards = opened(server, tmp_path)
    store, fork = ShardStore(tmp_path / "cache", 10**6), multiprocessing.get_context("fork")
    assert same(store, shards[0])
    done = fork.Queue()
    child = fork.Process(target=_read_many, args=(store, shards, 0, 20, done), daemon=True)
    child.start()
    child.join(60)
    assert child.exitcode == 0
