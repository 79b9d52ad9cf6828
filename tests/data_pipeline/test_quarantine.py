"""The quarantine: what is in it, from which step on, and that no kill damages it."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.errors import DataError
from data_pipeline.reading.quarantine import Broken, Quarantine, broken_entry
from data_pipeline.reading.sample import KINDS

entries = st.lists(
    st.builds(
        broken_entry,
        st.integers(0, 50),
        st.sampled_from(["a", "b"]),
        st.text(max_size=20),
        st.sampled_from(["k1", "k2", "k\n3", "\u2028\x00\ud800"]),
        st.sampled_from(KINDS),
        st.text(max_size=900),
    ),
    max_size=12,
)


def first_steps(found: list[Broken]) -> dict[tuple[str, str], int]:
    steps: dict[tuple[str, str], int] = {}
    for entry in found:
        name = (entry.dataset, entry.key)
        steps[name] = min(entry.step, steps.get(name, entry.step))
    return steps


def assert_holds(quarantine: Quarantine, steps: dict[tuple[str, str], int]) -> None:
    for dataset in ("a", "b"):
        for key in ("k1", "k2", "k\n3", "\u2028\x00\ud800", "other"):
            for step in range(52):
                since = steps.get((dataset, key), 99)
                assert quarantine.holds(dataset, key, step) == (since <= step)


@given(first=entries, second=entries)
def test_an_entry_holds_from_its_step_on(tmp_path_factory, first, second):
    path = tmp_path_factory.mktemp("q") / "run" / "quarantine.jsonl"
    quarantine = Quarantine(path)
    quarantine.add(first)
    assert_holds(quarantine, first_steps(first))
    quarantine.add(second)
    assert_holds(quarantine, first_steps(first + second))
    again = Quarantine(path)
    assert again.entries == quarantine.entries
    assert_holds(again, first_steps(first + second))
    # One line each, whatever is in a name, and no line is long.
    lines = path.read_bytes().splitlines() if path.exists() else []
    assert len(lines) == len(quarantine)
    assert all(len(line) < 12 * 900 and line.isascii() for line in lines)
    assert [Broken(**json.loads(line)) for line in lines] == quarantine.entries
    # What is known is not written twice.
    quarantine.add(first + second)
    assert len(Quarantine(path)) == len(lines)


@given(found=entries, step=st.integers(0, 60))
def test_until_a_step_counts_what_it_goes_without(tmp_path_factory, found, step):
    quarantine = Quarantine(tmp_path_factory.mktemp("q") / "quarantine.jsonl")
    quarantine.add(found)
    counted = {(entry.dataset, entry.key) for entry in quarantine.until(step)}
    assert len(counted) == len(quarantine.until(step))
    assert counted == {name for name, first in first_steps(found).items() if first <= step}


@given(found=entries, lost=st.integers(1, 4000))
def test_a_line_that_a_kill_cut_off_is_dropped_and_the_next_one_is_whole(
    tmp_path_factory, found, lost
):
    path = tmp_path_factory.mktemp("q") / "quarantine.jsonl"
    Quarantine(path).add(found)
    whole = path.read_bytes() if path.exists() else b""
    kept = whole[: max(0, len(whole) - lost)]
    path.write_bytes(kept)
    assert len(Quarantine(path, writes=False)) == 0  # another rank, which is told by the first
    assert path.read_bytes() == kept
    quarantine = Quarantine(path)
    assert len(quarantine) == kept.count(b"\n")
    known = list(quarantine.entries)
    last = broken_entry(77, "z", "z.tar", "last", "slow", "x")
    quarantine.add([last])
    assert Quarantine(path).entries == [*known, last]


def test_only_one_process_writes(tmp_path):
    path = tmp_path / "quarantine.jsonl"
    entry = broken_entry(3, "a", "a.tar", "k", "large", "too large")
    reader = Quarantine(path, writes=False)
    reader.add([entry])
    assert reader.holds("a", "k", 3)
    assert not path.exists()


@given(found=entries)
def test_a_state_brings_back_what_the_file_lost(tmp_path_factory, found):
    folder = tmp_path_factory.mktemp("q")
    quarantine = Quarantine(folder / "one.jsonl")
    quarantine.add(found)
    state = json.loads(json.dumps(quarantine.state()))
    other = Quarantine(folder / "other.jsonl")
    other.restore(state)
    assert other.entries == quarantine.entries
    assert Quarantine(folder / "other.jsonl").entries == quarantine.entries


@pytest.mark.parametrize(
    "line",
    [
        b"nothing",
        b"[]",
        b'{"step": 1}',
        b'{"step": "1", "dataset": "a", "shard": "a", "key": "k", "kind": "slow", "reason": ""}',
        b'{"step": 1, "dataset": "a", "shard": "a", "key": "k", "kind": "sad", "reason": ""}',
        b'{"step": 1, "dataset": "a", "shard": "a", "key": 7, "kind": "slow", "reason": ""}',
        b'{"step": 1, "dataset": "a", "shard": "a", "key": "k", "kind": "slow", "other": ""}',
        b"\xff\xfe",
        b"[" * 100_000,
    ],
)
def test_a_file_that_is_something_else_is_refused_by_line(tmp_path, line):
    path = tmp_path / "quarantine.jsonl"
    quarantine = Quarantine(path)
    quarantine.add([broken_entry(1, "a", "a.tar", "k", "slow", "x")])
    with path.open("ab") as file:
        file.write(line + b"\n")
    with pytest.raises(DataError, match=r"quarantine.jsonl line 2"):
        Quarantine(path)
    with pytest.raises(DataError, match="state is damaged"):
        quarantine.restore([["x"]])


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    quarantine = Quarantine(tmp_path / "folder" / "quarantine.jsonl")
    (tmp_path / "folder").write_text("in the way")
    with pytest.raises(DataError, match="cannot be written"):
        quarantine.add([broken_entry(1, "a", "a.tar", "k", "slow", "x")])


def test_reasons_are_bounded():
    assert len(broken_entry(1, "a", "a.tar", "k", "slow", "x" * 10**6).reason) < 600


def test_entries_are_on_disk_when_add_returns(tmp_path, monkeypatch):
    synced: list[str] = []
    fsync = os.fsync

    def spy(number: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{number}"))
        fsync(number)

    monkeypatch.setattr(os, "fsync", spy)
    path = Path(os.path.realpath(tmp_path)) / "run" / "quarantine.jsonl"
    quarantine = Quarantine(path)
    quarantine.add([broken_entry(1, "a", "a.tar", "k", "slow", "x")])
    assert synced == [str(path), str(path.parent)]  # the file, and that it is there
    quarantine.add([broken_entry(1, "a", "a.tar", "other", "slow", "x")])
    assert synced.count(str(path)) == 2
