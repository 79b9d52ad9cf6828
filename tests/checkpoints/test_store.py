"""Sharded tensors on disk: any cut reads what any other wrote; what is damaged is refused."""

from __future__ import annotations

import json
import os
import pickle
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from unimoe_mcore.checkpoints.pieces import Piece, pieces_of
from unimoe_mcore.checkpoints.shard_file import HostCopy, index_check
from unimoe_mcore.checkpoints.store import ShardReader, write_shards
from unimoe_mcore.config.errors import UserError

NAME = "language_model.decoder.layers.mlp.linear_fc1.weight"


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor whose elements are all different."""
    return torch.arange(torch.Size(shape).numel()).reshape(shape).to(dtype)


def grid(
    whole: torch.Tensor, cuts: Sequence[int], name: str = NAME, stacked: bool = False
) -> Iterator[ShardedTensor]:
    """A tensor cut into equal parts along every axis, as ranks would hold them.

    Args:
        cuts: parts per axis.
        stacked: leave out the first axis of every part, as Megatron does for a stack of experts.
    """
    for place in product(*map(range, cuts)):
        part = whole
        for axis, (number, count) in enumerate(zip(place, cuts, strict=True)):
            part = part.chunk(count, axis)[number]
        offsets = [(axis, number, cuts[axis]) for axis, number in enumerate(place)]
        part = part[0] if stacked else part
        yield ShardedTensor.from_rank_offsets(
            name, part.clone(), *offsets, prepend_axis_num=int(stacked)
        )


def write(folder: Path, parts: Sequence[ShardedTensor], ranks: int = 1) -> Path:
    """Deal the parts to some ranks, each of which writes its own file."""
    folder.mkdir(parents=True, exist_ok=True)
    for rank in range(ranks):
        write_shards(folder, iter(parts[rank::ranks]), rank)
    return folder


DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.int64])


@st.composite
def cut_tensors(draw: st.DrawFn) -> tuple[torch.Tensor, list[int], list[int], bool]:
    """A tensor of one to three axes and two ways to cut it into equal parts."""
    axes = draw(st.integers(1, 3))
    stacked = axes > 1 and draw(st.booleans())
    before = draw(st.lists(st.integers(1, 3), min_size=axes, max_size=axes))
    after = draw(st.lists(st.integers(1, 3), min_size=axes, max_size=axes))
    units = draw(st.lists(st.integers(1, 2), min_size=axes, max_size=axes))
    shape = [b * a * unit for b, a, unit in zip(before, after, units, strict=True)]
    if stacked:
        before[0] = after[0] = shape[0]
    return numbers(*shape, dtype=draw(DTYPES)), before, after, stacked


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(case=cut_tensors(), ranks=st.integers(1, 4))
def test_any_cut_reads_what_any_other_wrote(
    case: tuple[torch.Tensor, list[int], list[int], bool],
    ranks: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    whole, before, after, stacked = case
    folder = write(tmp_path_factory.mktemp("cut"), list(grid(whole, before, NAME, stacked)), ranks)
    reader = ShardReader(folder)
    assert torch.equal(reader.read(NAME), whole)
    for wanted in grid(whole, after, NAME, stacked):
        assert wanted.data is not None
        expected = wanted.data.clone()
        wanted.data.zero_()
        reader.fill(wanted)
        assert torch.equal(wanted.data, expected)


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_any_slice_can_be_read(data: st.DataObject, cut_folder: Path) -> None:
    offset, shape = [], []
    for size in (6, 4, 4):
        low = data.draw(st.integers(0, size - 1))
        offset.append(low)
        shape.append(data.draw(st.integers(1, size - low)))
    found = ShardReader(cut_folder, verify=False).read(NAME, tuple(offset), tuple(shape))
    where = tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))
    assert torch.equal(found, numbers(6, 4, 4)[where])


def stretches(
    data: st.DataObject, whole: torch.Tensor, cuts: Sequence[int], halves: bool, stacked: bool
) -> list[Piece]:
    """A tensor cut into blocks, and these into stretches that begin and end anywhere.

    Args:
        halves: describe every block by a factory that splits its rows in two, as Megatron does with
            gated layers.
    """
    pieces = []
    for place, block in zip(
        product(*map(range, cuts)), grid(whole, cuts, NAME, stacked), strict=True
    ):
        local = block.data
        assert local is not None
        size = local.numel()
        ends = sorted({0, size, *data.draw(st.lists(st.integers(0, size), max_size=3))})
        for number, (start, stop) in enumerate(pairwise(ends)):
            replica = (0, 0, number)
            described: Any = replace(block, replica_id=replica)
            if halves:
                described = ShardedTensorFactory(
                    NAME, local, in_halves(place, cuts), torch.cat, replica
                )
            values = local.reshape(-1)[start:stop].clone()
            pieces += pieces_of(described, local.shape, "x", values, start, shared=True)
    return pieces


def in_halves(place: Sequence[int], cuts: Sequence[int]) -> Any:
    """Splits the rows of the block at ``place`` in two."""
    rest = [(axis, place[axis], cuts[axis]) for axis in range(1, len(cuts))]

    def build(key: str, values: torch.Tensor, replica: Any, _: Any) -> list[ShardedTensor]:
        return [
            ShardedTensor.from_rank_offsets(
                key, half, (0, 2 * place[0] + number, 2 * cuts[0]), *rest, replica_id=replica
            )
            for number, half in enumerate(values.chunk(2))
        ]

    return build


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    case=cut_tensors(), ranks=st.integers(1, 4), halves=st.tuples(*[st.booleans()] * 2),
    data=st.data(),
)  # fmt: skip
def test_any_stretches_read_what_any_others_wrote(
    case: tuple[torch.Tensor, list[int], list[int], bool],
    ranks: int,
    halves: tuple[bool, bool],
    data: st.DataObject,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    some, before, after, stacked = case
    double = 1 if stacked else 2  # rows that can be halved
    whole = numbers(double * some.shape[0], *some.shape[1:], dtype=some.dtype)
    folder = tmp_path_factory.mktemp("stretches")
    written = stretches(data, whole, before, halves[0] and not stacked, stacked)
    random.Random(ranks).shuffle(written)
    for rank in range(ranks):
        HostCopy().take(written[rank::ranks]).write(folder, rank)
    reader = ShardReader(folder)
    reader.check_complete()
    assert torch.equal(reader.read(f"x.{NAME}"), whole)
    for wanted in stretches(data, whole, after, halves[1] and not stacked, stacked):
        expected = wanted.data.clone()
        wanted.data.zero_()
        reader.fill(wanted)
        assert torch.equal(wanted.data, expected)


@pytest.fixture(scope="module")
def cut_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tensor [6, 4, 4] in twelve parts, written by three ranks."""
    return write(tmp_path_factory.mktemp("cut"), list(grid(numbers(6, 4, 4), (3, 2, 2))), 3)


def test_a_replica_is_written_once_and_a_view_without_its_storage(tmp_path: Path) -> None:
    whole = numbers(4, 1000)
    for rank, replica in enumerate([(0, 0, 0), (0, 0, 1), (0, 1, 0)]):
        view = ShardedTensor.from_rank_offsets(NAME, whole[1:2], replica_id=replica)
        write_shards(tmp_path, iter([view]), rank)
    (part,) = ShardReader(tmp_path).tensors[NAME].parts
    assert part.file.name == "rank-00000.safetensors"
    assert 4000 <= (tmp_path / "rank-00000.safetensors").stat().st_size < 5000
    assert (tmp_path / "rank-00001.safetensors").stat().st_size < 100
    assert torch.equal(ShardReader(tmp_path).read(NAME), whole[1:2])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two tensors, written by two ranks."""
    parts = [*grid(numbers(8, 6), (2, 1)), *grid(numbers(5), (1,), "norm.weight")]
    return write(tmp_path / "step-00000004", parts, 2)


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def edit(path: Path, change: Callable[[dict[str, Any]], Any], honest: bool = True) -> None:
    """Change an index and, unless it is a dishonest one, leave its old checksum."""
    index = json.loads(path.read_text())
    change(index)
    if not honest:
        index["check"] = index_check(index)
    path.write_text(json.dumps(index))


FILE, INDEX = "rank-00001.safetensors", "rank-00001.json"
DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a flipped bit of a weight": (
        lambda f: flip(f / FILE, -1),
        f"{FILE} is damaged: its checksum",
    ),
    "a flipped bit of a header": (
        lambda f: flip(f / FILE, 20),
        f"{FILE} is damaged: its checksum",
    ),
    "a truncated file": (lambda f: os.truncate(f / FILE, 60), f"{FILE} is damaged: its checksum"),
    "an empty file": (lambda f: os.truncate(f / FILE, 0), f"{FILE} is damaged: its checksum"),
    "a missing file": (lambda f: (f / FILE).unlink(), f"{FILE} is missing: the checkpoint is inc"),
    "a missing rank": (
        lambda f: ((f / FILE).unlink(), (f / INDEX).unlink()),
        f"has 24 of the 48 elements of {NAME}: files are missing",
    ),
    "another checkpoint's rank": (
        lambda f: write_shards(f, grid(numbers(8, 6), (1, 1)), 2),
        f"has 96 of the 48 elements of {NAME}",
    ),
    "an empty index": (lambda f: (f / INDEX).write_text(""), f"{INDEX} is no index"),
    "half an index": (lambda f: os.truncate(f / INDEX, 200), f"{INDEX} is no index"),
    "an index of bytes": (lambda f: (f / INDEX).write_bytes(b"\xff\xfe{"), f"{INDEX} is no index"),
    "a list for an index": (lambda f: (f / INDEX).write_text("[1, 2]"), f"{INDEX} is no index"),
    "a wrong offset": (
        lambda f: edit(f / INDEX, lambda i: i["parts"][0].update(offset=[0, 0])),
        f"{INDEX} is damaged: its checksum",
    ),
    "a wrong key": (
        lambda f: edit(f / INDEX, lambda i: i["parts"][0].pop("offset"), honest=False),
        f"{INDEX} is no index of a checkpoint: 'offset'",
    ),
    "no type of numbers": (
        lambda f: edit(f / INDEX, lambda i: i["parts"][0].update(dtype="load"), honest=False),
        f"{INDEX} is no index of a checkpoint: 'load'",
    ),
    "two shapes of one tensor": (
        lambda f: edit(f / INDEX, lambda i: i["parts"][0].update(global_shape=[6, 8]), False),
        f"{INDEX} is no index of a checkpoint: {NAME} is another tensor in the other files",
    ),
    "no folder": (lambda f: f.rename(f.with_name("elsewhere")), "There are no weights in "),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused_in_words(damage: str, folder: Path) -> None:
    ShardReader(folder)
    change, words = DAMAGES[damage]
    change(folder)
    with pytest.raises(UserError) as refused:
        ShardReader(folder)
    assert words in str(refused.value)
    assert folder.name in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"dtype": "bfloat16"},
            "rank-00000.safetensors holds torch.float32, its index says torch.bfloat16",
        ),
        ({"part": "000007"}, "rank-00000.safetensors cannot be read"),
    ],
)
def test_parts_that_are_not_what_the_index_says_are_refused(
    change: dict[str, str], words: str, folder: Path
) -> None:
    edit(folder / "rank-00000.json", lambda i: i["parts"][1].update(change), honest=False)
    reader = ShardReader(folder)
    assert reader.read(NAME).shape == (8, 6)
    with pytest.raises(UserError, match=words):
        reader.read("norm.weight")


def test_a_missing_tensor_and_a_wrong_shape_are_refused_in_words(folder: Path) -> None:
    reader = ShardReader(folder)
    for attempt in (
        lambda: reader.read("router.weight"),
        lambda: reader.fill(ShardedTensor.from_rank_offsets("router.weight", torch.zeros(2))),
    ):
        with pytest.raises(UserError, match=r"step-00000004 has no tensor router\.weight\."):
            attempt()
    wanted = ShardedTensor.from_rank_offsets(NAME, torch.zeros(4, 6), (0, 0, 3))
    with pytest.raises(UserError) as refused:
        reader.fill(wanted)
    assert f"{NAME} has shape [8, 6] in {folder}" in str(refused.value)
    assert "needs [12, 6]" in str(refused.value)
    assert wanted.data is not None
    assert not wanted.data.any()


class Trap:
    """An object whose unpickling makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("verify", [True, False])
def test_a_pickle_is_never_executed(verify: bool, folder: Path, tmp_path: Path) -> None:
    from data_pipeline.shards.integrity import file_sha256

    trap = tmp_path / "trapped"
    with (folder / FILE).open("wb") as file:
        pickle.dump(Trap(trap), file)
    # Even where whoever made it has mended all checksums.
    digest = file_sha256(folder / FILE)
    edit(folder / INDEX, lambda index: index.update(sha256=digest), honest=False)
    with pytest.raises(UserError, match=f"{FILE} cannot be read"):
        ShardReader(folder, verify).read(NAME)
    (folder / INDEX).write_bytes(pickle.dumps(Trap(trap)))
    with pytest.raises(UserError, match=f"{INDEX} is no index"):
        ShardReader(folder, verify)
    assert not trap.exists()
    pickle.loads(pickle.dumps(Trap(trap)))  # the trap does work
    assert trap.exists()


@pytest.mark.parametrize("place", ["../outside.safetensors", "{}/outside.safetensors", ".."])
def test_an_index_does_not_lead_out_of_its_folder(place: str, folder: Path, tmp_path: Path) -> None:
    (folder / FILE).rename(tmp_path / "outside.safetensors")
    edit(
        folder / INDEX,
        lambda index: index.update(file=place.format(tmp_path)),
        honest=False,
    )
    with pytest.raises(UserError, match="is missing: the checkpoint is incomplete"):
        ShardReader(folder)
