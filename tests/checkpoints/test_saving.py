"""Saving behind the loop's back: whole or not there, also when it is killed; which are kept."""

from __future__ import annotations

import multiprocessing
import os
import random
import resource
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from unimoe_mcore.checkpoints.pieces import Piece, piece_of
from unimoe_mcore.checkpoints.saving import Saver
from unimoe_mcore.checkpoints.store import ShardReader
from unimoe_mcore.checkpoints.training import CheckpointFolder, RunState, read_state
from unimoe_mcore.config.errors import UserError

ROWS, COLUMNS = 64, 4096


def pieces(value: float, rank: int, ranks: int) -> Iterator[Piece]:
    """This rank's rows of a tensor of one value, and its copy of one that all ranks have."""
    rows = torch.full((ROWS, COLUMNS), value)
    yield piece_of(ShardedTensor.from_rank_offsets("rows", rows, (0, rank, ranks)))
    norm = torch.full((7,), value)
    yield piece_of(ShardedTensor.from_rank_offsets("norm", norm, replica_id=(0, 0, rank)))


def state(step: int) -> RunState:
    return RunState(step, {}, {}, "fp32")


def savers(folder: Path, ranks: int = 2, **rules: int) -> list[Saver]:
    checkpoints = CheckpointFolder(folder, **{"keep": 2, **rules})
    return [Saver(checkpoints, rank, ranks, "now") for rank in range(ranks)]


def save(every: list[Saver], step: int) -> None:
    for saver in every:
        saver.save(pieces(float(step), saver.rank, len(every)), state(step))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*step*"))


def check(folder: Path, ranks: int = 2) -> int:
    """The step of a checkpoint that must be whole and right."""
    step = read_state(folder).step
    reader = ShardReader(folder)
    reader.check_complete()
    assert torch.equal(reader.read("rows"), torch.full((ROWS * ranks, COLUMNS), float(step)))
    assert torch.equal(reader.read("norm"), torch.full((7,), float(step)))
    assert folder.name == f"step-{step:08d}"
    return step


def test_it_is_visible_when_the_last_rank_has_written(tmp_path: Path) -> None:
    first, second = savers(tmp_path)
    first.save(pieces(1.0, 0, 2), state(1))
    deadline = time.monotonic() + 20
    while not list(tmp_path.glob(".partial-*/rank-00000.json")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert first.poll() == []
    assert names(tmp_path) == [".partial-step-00000001-now"]
    second.save(pieces(1.0, 1, 2), state(1))
    (saved,) = first.wait()
    assert (saved.step, saved.bytes) == (1, 4 * (ROWS * COLUMNS + 7))
    assert saved.writing > 0
    assert names(tmp_path) == ["step-00000001"]
    check(tmp_path / "step-00000001")
    assert first.poll() == []


def test_what_is_trained_meanwhile_is_not_saved(tmp_path: Path) -> None:
    (saver,) = savers(tmp_path, 1)
    live = list(pieces(1.0, 0, 1))
    saver.save(live, state(1))
    for piece in live:
        piece.data.fill_(2.0)
    saver.save(live, state(2))
    for piece in live:
        piece.data.fill_(3.0)
    assert [saved.step for saved in saver.wait()] == [1, 2]
    assert [check(folder, 1) for folder in saver.folder.finished()] == [2, 1]


def look_between_steps(saver: Saver) -> None:
    for _ in range(1000):
        saver.poll()
        time.sleep(0.01)


def test_a_file_that_cannot_be_written_ends_the_run_in_a_sentence(tmp_path: Path) -> None:
    (saver,) = savers(tmp_path, 1)
    save([saver], 1)
    saver.wait()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
    try:
        save([saver], 2)
        with pytest.raises(UserError) as refused:
            look_between_steps(saver)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "The checkpoint of step 2 could not be written" in str(refused.value)
    assert "File too large" in str(refused.value)
    assert "continues from the checkpoint before" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert [check(folder, 1) for folder in saver.folder.finished()] == [1]


Cut = Callable[[Piece, int], Piece]


def unwritten(piece: Piece, rank: int) -> Piece:
    return replace(piece, writes=False) if piece.name == "norm" else piece


def written_twice(piece: Piece, rank: int) -> Piece:
    return replace(piece, writes=True) if piece.name == "norm" else piece


def same_rows(piece: Piece, rank: int) -> Piece:
    return replace(piece, offset=(0, 0)) if piece.name == "rows" else piece


def crossing(piece: Piece, rank: int) -> Piece:
    """Stretches of equal length that cross, so that the sum of all elements is right."""
    if piece.name != "rows" or rank == 0:
        return piece
    return replace(piece, offset=(ROWS // 2, 0))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (unwritten, "lacks norm: no process wrote any of it"),
        (written_twice, "has 14 of the 7 elements of norm"),
        (same_rows, "has elements of rows twice"),
        (crossing, "has elements of rows twice"),
    ],
)
def test_what_is_not_whole_is_refused_when_it_is_saved(
    spoil: Cut, words: str, tmp_path: Path
) -> None:
    first, second = savers(tmp_path)
    for saver in (second, first):
        saver.save((spoil(p, saver.rank) for p in pieces(1.0, saver.rank, 2)), state(1))
    second.wait()
    with pytest.raises(UserError, match=words):
        first.wait()
    assert first.folder.finished() == []


def _endless(folder: Path) -> None:
    """Two ranks that save, one checkpoint after the other, until they are killed."""
    torch.set_num_threads(1)
    every = savers(folder)
    every[0].folder.clear()
    step = max([int(p.name[5:]) for p in every[0].folder.finished()], default=0)
    while True:
        step += 1
        save(every, step)


def test_no_kill_leaves_one_that_is_wrong(tmp_path: Path) -> None:
    checkpoints = CheckpointFolder(tmp_path, keep=2)
    seen, partial = [0], 0
    for _ in range(12):
        process = multiprocessing.get_context("fork").Process(target=_endless, args=(tmp_path,))
        process.start()
        assert process.pid is not None
        time.sleep(random.uniform(0.05, 0.3))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        partial += any(tmp_path.glob(".partial-*"))
        found = [check(folder) for folder in checkpoints.finished()]
        assert found == sorted(found, reverse=True)
        seen.append(max(found, default=0))
        assert seen[-1] >= seen[-2]
    assert seen[-1] > 3
    assert partial > 3  # some were killed while they wrote
    checkpoints.clear()
    assert all(name.startswith("step-") for name in names(tmp_path))


@pytest.mark.parametrize(
    ("rules", "best", "kept"),
    [
        ({"keep": 2}, None, [5, 6]),
        ({"keep": 1}, None, [6]),
        ({"keep": 1, "keep_every": 3}, None, [3, 6]),
        ({"keep": 2}, 3, [3, 5, 6]),
        ({"keep": 2, "keep_every": 2}, 1, [1, 2, 4, 5, 6]),
    ],
)
def test_the_newest_the_regular_and_the_best_are_kept(
    rules: dict[str, int], best: int | None, kept: list[int], tmp_path: Path
) -> None:
    every = savers(tmp_path, **rules)
    checkpoints = every[0].folder
    assert checkpoints.best() is None
    for step in range(1, 7):
        save(every, step)
        if best is not None and step <= best:
            checkpoints.mark_best(step)  # while it is being written
    for saver in every:
        saver.wait()
    assert [check(folder) for folder in reversed(checkpoints.finished())] == kept
    assert checkpoints.best() == (None if best is None else checkpoints.at(best))
