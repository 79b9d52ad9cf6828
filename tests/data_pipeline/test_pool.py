"""Workers change nothing of what is read, can be killed at any moment, and never stay behind."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import pytest

from data_pipeline.errors import DataError
from data_pipeline.planning.tower_rule import TowerRule
from data_pipeline.reading.in_progress import left_in_progress
from data_pipeline.reading.pool import ReaderPool, _readable
from data_pipeline.reading.reader import ReadingJob, SampleReader
from data_pipeline.reading.remote import ShardStore
from data_pipeline.reading.sample import BrokenSample, Sample
from data_pipeline.reading.watch import NOWHERE
from data_pipeline.shards.index import ShardIndex
from tests.data_pipeline.reading_set import ROWS, RULE, job, open_set, row, same, tasks, trap, write

LONG = 60.0
"""Seconds for a sample, more than any takes."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The set; nobody may change it."""
    return write(tmp_path_factory.mktemp("set"))


@pytest.fixture(scope="module")
def plain(folder) -> ReadingJob:
    return job(open_set(folder))


@pytest.fixture(scope="module")
def expected(plain) -> list[Sample]:
    """Every sample, read without any pool."""
    reader = SampleReader(plain)
    return [reader.read(number) for number in range(ROWS)]


def assert_right(found, rows, expected, broken=None) -> None:
    """The samples of a task are the expected ones, but for those that are named broken."""
    assert len(found) == len(rows)
    for outcome, number in zip(found, rows, strict=True):
        key = expected[number].key
        if key in (broken or {}):
            assert isinstance(outcome, BrokenSample)
            assert (outcome.key, outcome.kind) == (key, broken[key])
            assert outcome.dataset == key.partition("-")[0]
        else:
            assert same(outcome, expected[number]), outcome


def running(pid: int) -> bool:
    """Whether there is such a process; a dead one that nobody has asked about does not count."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def until(condition, seconds: float = 30.0) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


@pytest.mark.parametrize("workers", [0, 1, 2, 4])
def test_the_same_samples_in_the_same_order(plain, expected, workers):
    rng = random.Random(workers)
    with ReaderPool(plain, workers, LONG) as pool:
        for start in range(3):  # other tasks every time, as many as there may be
            rows = [rng.choices(range(ROWS), k=rng.randint(0, 9)) for _ in range(8)]
            numbers = [1000 * start + 7 * n for n in range(len(rows))]
            for number, chosen in zip(numbers, rows, strict=True):
                pool.submit(number, chosen)
            together = list(zip(numbers, rows, strict=True))
            rng.shuffle(together)
            for number, chosen in together:
                assert_right(pool.result(number), chosen, expected)


def test_more_tasks_than_a_socket_holds(plain, expected):
    wanted = {number: [row(f"plain-{number % 4}")] * 40 for number in range(500)}
    with ReaderPool(plain, 1, LONG) as pool:
        for number, rows in wanted.items():
            pool.submit(number, rows)
        assert pool._queue  # so that this test tests something
        for number in (499, 0, 250):
            assert_right(pool.result(number), wanted[number], expected)


def test_workers_go_on_while_nobody_asks(plain, expected):
    wanted = tasks(3)
    with ReaderPool(plain, 2, LONG) as pool:
        for number, rows in wanted.items():
            pool.submit(number, rows)
        workers = pool._workers
        # Nobody has asked yet, and still all orders are taken and done.
        assert until(lambda: not _readable([pool._offers.fileno()], 0))
        assert until(lambda: all(worker.place.task == NOWHERE for worker in workers))
        for worker in workers:
            os.kill(worker.pid, signal.SIGSTOP)
        for number, rows in wanted.items():
            assert_right(pool.result(number), rows, expected)


def test_memory_goes_with_the_arrays(plain):
    def mapped() -> int:
        return Path("/proc/self/maps").read_text().count("memfd:samples")

    before, files = mapped(), len(os.listdir("/proc/self/fd"))
    with ReaderPool(plain, 1, LONG) as pool:
        pool.submit(0, [row("pic-1"), row("talk-1")])
        picture, talk = (sample.media[0].content for sample in pool.result(0))
        assert mapped() == before + 1
        assert talk.flags.writeable  # else torch complains
        talk[:] = 0
        assert picture.any()
        assert talk.ctypes.data % 64 == 0
        del picture
        assert mapped() == before + 1
        del talk
        assert mapped() == before
    assert len(os.listdir("/proc/self/fd")) == files


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    ("traps", "kinds"),
    [
        ({"talk_3": "hang"}, {"talk-3": "slow"}),
        ({"talk_3": "crash"}, {"talk-3": "crashed"}),
        ({"talk_3": "kill"}, {"talk-3": "crashed"}),
        (
            {"talk_0": "exit", "talk_3": "crash", "talk_4": "hang", "talk_7": "spin"},
            {"talk-0": "crashed", "talk-3": "crashed", "talk-4": "slow", "talk-7": "slow"},
        ),
    ],
)
def test_a_wild_decoder_costs_its_sample_only(folder, expected, workers, traps, kinds):
    wanted = tasks()
    with ReaderPool(job(open_set(folder), rule=trap(**traps)), workers, 2.0) as pool:
        for number, rows in wanted.items():
            pool.submit(number, rows)
        found = [(rows, pool.result(number)) for number, rows in wanted.items()]
    for rows, outcomes in found:
        assert_right(outcomes, rows, expected, kinds)
    reasons = {o.key: o.reason for _, each in found for o in each if isinstance(o, BrokenSample)}
    assert set(reasons) == set(kinds)
    how = {"hang": "longer than 2 s", "spin": "longer than 2 s", "crash": "SIGSEGV", "exit": "7"}
    how["kill"] = "SIGKILL"
    for name, what in traps.items():
        assert how[what] in reasons[name.replace("_", "-")]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_system_that_hangs(folder, expected, tmp_path, workers):
    """Features that lie on a pipe whose other end never comes: ``open`` does not return."""
    stuck = expected[row("pic-5")].media[0].digest
    (tmp_path / stuck[:2]).mkdir()
    os.mkfifo(tmp_path / stuck[:2] / f"{stuck}.npy")
    wanted = tasks()
    found = job(open_set(folder), features={"image": tmp_path})
    with ReaderPool(found, workers, 2.0) as pool:
        for number, rows in wanted.items():
            pool.submit(number, rows)
        for number, rows in wanted.items():
            assert_right(pool.result(number), rows, expected, {"pic-5": "slow"})


def test_what_swallows_an_interruption_is_interrupted_again(folder, expected):
    rows = [row("talk-2"), row("talk-3"), row("talk-4")]
    with ReaderPool(job(open_set(folder), rule=trap(talk_3="spin")), 0, 0.5) as pool:
        pool.submit(0, rows)
        assert_right(pool.result(0), rows, expected, {"talk-3": "slow"})


def test_somebody_elses_timer_goes_on(plain):
    rung = []
    before = signal.signal(signal.SIGALRM, lambda *_: rung.append(1))
    timer = signal.setitimer(signal.ITIMER_REAL, 0.4)
    try:
        with ReaderPool(plain, 0, LONG) as pool:
            pool.submit(0, [row("pic-0")] * 3)
            pool.result(0)
        assert 0 < signal.getitimer(signal.ITIMER_REAL)[0] < 0.4
        assert until(lambda: rung)
    finally:
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, *timer)


def test_reading_in_a_thread_without_workers(plain, expected):
    found = []
    with ReaderPool(plain, 0, LONG) as pool:
        pool.submit(0, [row("pic-0"), row("hum-0")])
        thread = threading.Thread(target=lambda: found.extend(pool.result(0)))
        thread.start()
        thread.join()
    assert_right(found, [row("pic-0"), row("hum-0")], expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_errors_arrive_with_their_task(folder, expected, workers):
    def read(pool: ReaderPool, task: int, keys: list[str]) -> list:
        pool.submit(task, [row(key) for key in keys])
        return [row(key) for key in keys]

    with ReaderPool(job(open_set(folder), rule=trap(talk_3="fail")), workers, LONG) as pool:
        good, bad = read(pool, 0, ["talk-2", "pic-0"]), read(pool, 1, ["talk-2", "talk-3"])
        assert bad
        more = read(pool, 2, ["talk-4"])
        assert_right(pool.result(2), more, expected)
        with pytest.raises((RuntimeError, ZeroDivisionError), match="a mistake in the rule"):
            pool.result(1)
        assert_right(pool.result(0), good, expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_that_is_gone_stops_the_task(tmp_path, workers):
    catalogue = open_set(write(tmp_path / "set"))
    gone = catalogue.entry(row("pic-0")).shard.path
    gone.unlink()
    with ReaderPool(job(catalogue), workers, LONG) as pool:
        pool.submit(0, [row("talk-0")])
        pool.submit(1, [row("talk-0"), row("pic-0")])
        assert pool.result(0)[0].key == "talk-0"
        with pytest.raises(DataError, match=str(gone)):
            pool.result(1)


@dataclass(frozen=True)
class Poison(TowerRule):
    """A rule that no worker survives."""

    def __setstate__(self, state) -> None:
        print("the rule is poisoned", file=sys.stderr, flush=True)
        os._exit(3)


def test_workers_that_cannot_start(folder, tmp_path):
    poisoned = job(open_set(folder), rule=Poison({}))
    for found, words in (
        (poisoned, r"(?s)exit status 3.*the rule is poisoned"),
        (replace(poisoned, rule=RULE, catalogue=tmp_path / "nowhere"), "nowhere"),
    ):
        with ReaderPool(found, 2, LONG) as pool:
            pool.submit(0, [0])
            with pytest.raises(DataError, match=words):
                pool.result(0)


def test_workers_that_somebody_kills(plain, expected):
    wanted = tasks(2)
    with ReaderPool(plain, 2, LONG) as pool:
        pool.submit(0, wanted[0])
        assert_right(pool.result(0), wanted[0], expected)
        for number in list(wanted)[1:]:
            if number % 3 == 0:  # idle ones: nobody can say that a sample was at fault
                assert until(lambda: all(w.place.position == NOWHERE for w in pool._workers))
                os.kill(pool._workers[number % 2].pid, signal.SIGKILL)
            pool.submit(number, wanted[number])
            assert_right(pool.result(number), wanted[number], expected)


class SlowStore(ShardStore):
    """Shards that are long in coming."""

    def open(self, shard: ShardIndex) -> BinaryIO:
        time.sleep(0.3)
        return super().open(shard)


@pytest.mark.parametrize("fetching", [True, False])
def test_a_busy_worker_that_somebody_kills_costs_no_sample(plain, expected, fetching):
    rows = [row(f"clip-{number % 3}") for number in range(30)]
    found = replace(plain, store=SlowStore()) if fetching else plain
    with ReaderPool(found, 1, LONG) as pool:
        pool.submit(0, rows)

        def busy() -> bool:
            place = pool._workers[0].place
            return place.position != NOWHERE and (place.since == 0) == fetching

        assert until(busy)
        os.kill(pool._workers[0].pid, signal.SIGKILL)
        assert_right(pool.result(0), rows, expected)


def test_what_is_done_is_not_offered_again(folder, expected):
    """Though nobody has received it yet when a worker dies."""
    hanging = trap(talk_3="hang", talk_4="hang")
    wanted = {number: [row("talk-1"), row("pic-2")] for number in range(1, 9)}
    with ReaderPool(job(open_set(folder), rule=hanging), 2, LONG) as pool:

        def hung() -> list[int]:
            return [w.pid for w in pool._workers if w.place.since]

        pool.submit(0, [row("talk-3"), row("talk-4")])
        offers = [pool._offers.fileno()]
        assert until(hung)
        (first,) = hung()
        (other,) = (worker for worker in pool._workers if worker.pid != first)
        for number, rows in wanted.items():
            pool.submit(number, rows)
        assert until(lambda: not _readable(offers, 0) and other.place.task == NOWHERE)
        os.kill(other.pid, signal.SIGSTOP)  # what it has done can be received
        os.kill(first, signal.SIGKILL)
        assert until(lambda: not running(first))
        for number, rows in wanted.items():
            assert_right(pool.result(number), rows, expected)
        assert until(lambda: hung() and hung() != [first])
        assert not _readable(offers, 0)
        (second,) = hung()
        os.kill(second, signal.SIGKILL)
        assert until(lambda: not running(second))
        os.kill(other.pid, signal.SIGCONT)
        pool.submit(1, wanted[1])  # the number is free again
        assert_right(pool.result(1), wanted[1], expected)


def test_a_suspended_job_has_no_slow_samples(folder, expected):
    rows = [row("talk-2"), row("talk-3")]
    with ReaderPool(job(open_set(folder), rule=trap(talk_3="nap")), 1, 1.5) as pool:
        pool.submit(0, rows)
        worker = pool._workers[0]
        assert until(lambda: worker.place.position == 1 and worker.place.since)
        os.kill(worker.pid, signal.SIGSTOP)
        time.sleep(1.8)  # this process does nothing either
        os.kill(worker.pid, signal.SIGCONT)
        assert_right(pool.result(0), rows, expected)


def test_signals_to_all_processes_of_a_job_are_for_the_pool(plain, expected):
    with ReaderPool(plain, 2, LONG) as pool:
        pool.submit(0, [0])
        for worker in pool._workers:  # they have hardly begun to start
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
                os.kill(worker.pid, number)
        pids = [worker.pid for worker in pool._workers]
        assert_right(pool.result(0), [0], expected)
        for pid in pids:
            os.kill(pid, signal.SIGINT)
        pool.submit(1, [1])
        assert_right(pool.result(1), [1], expected)
        assert [worker.pid for worker in pool._workers] == pids


def test_close_leaves_no_process(folder):
    pool = ReaderPool(job(open_set(folder), rule=trap(talk_3="hang")), 3, LONG)
    files = len(os.listdir("/proc/self/fd"))
    pool.submit(0, [row("talk-3")])
    pool.submit(1, [row("talk-2")])
    pids = [worker.pid for worker in pool._workers]
    pool.result(1)
    pool.close()
    pool.close()
    assert not any(map(running, pids))
    assert len(os.listdir("/proc/self/fd")) == files


def _start(*arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "tests.data_pipeline.cases_pool", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_killed_program_leaves_no_process(folder):
    """Also where a worker hangs in C, and where the thread that started them is gone."""
    with _start("workers", str(folder)) as program:
        pids = [int(word) for word in program.stdout.readline().split()]
        assert len(pids) == 3
        time.sleep(0.3)
        assert all(map(running, pids))
        program.kill()
    assert until(lambda: not any(map(running, pids)))


@pytest.mark.parametrize(
    ("what", "kind", "words"), [("hang", "slow", "Timeout"), ("crash", "crashed", "Segmentation")]
)
def test_a_process_that_dies_of_a_sample_leaves_a_note(folder, tmp_path, what, kind, words):
    note = tmp_path / "notes" / "rank-0"
    with _start(what, str(folder), str(note)) as program:
        program.communicate(timeout=60)
    assert program.returncode != 0
    left = left_in_progress(note)
    assert left.task == 7
    found = left.sample
    assert (found.kind, found.dataset, found.key) == (kind, "talk", "talk-3")
    assert found.shard == "talk-00000.tar"
    assert words in found.reason


def test_bytes_may_be_long_in_coming(folder, tmp_path):
    with _start("far", str(folder), str(tmp_path / "note")) as program:
        out, words = program.communicate(timeout=60)
    assert program.returncode == 0, words
    assert out.strip() == "['plain-0', 'plain-1']"


def test_a_killed_process_says_nothing_against_its_sample(folder, tmp_path):
    note = tmp_path / "note"
    with _start("spin", str(folder), str(note)) as program:
        assert until(lambda: note.is_file() and b"talk-3" in note.read_bytes())
        program.kill()
    assert left_in_progress(note) is None
    assert left_in_progress(tmp_path / "none") is None


def test_a_process_that_ends_leaves_no_note(folder, tmp_path):
    with _start("nothing", str(folder), str(tmp_path / "note")) as program:
        out, words = program.communicate(timeout=60)
    assert program.returncode == 0, words
    assert "talk-3" in out
    assert not list(tmp_path.iterdir())
