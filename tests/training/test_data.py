"""Broken samples, other numbers of ranks, changed plans: what a run does about them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.reading.records import RecordReader
from data_pipeline.shards.index import index_path, load_index
from data_pipeline.shards.integrity import write_manifest
from data_pipeline.shards.schema import parse_sample
from data_pipeline.shards.writer import ShardWriter
from tests.conftest import World
from tests.data_pipeline.shard_samples import foreign, members_of
from tests.distributed import run_distributed
from tests.workspace import branch, build_data

CASES = "tests.training.cases_data"
STEPS = ["trainer.steps=8", "trainer.checkpoint_every=2"]
SUMMATION = 1e-5  # relative, fp32: two ranks add the same numbers in another order


def damaged(folder: Path, dataset: str, spoil: Callable[[int, bytes], bytes]) -> None:
    """Write the training shards of a dataset anew with other media."""
    place = folder / "train" / dataset
    shards = [load_index(tar) for tar in sorted(place.glob("*.tar"))]
    reader, kept = RecordReader(), []
    for shard in shards:
        for facts in shard.samples:
            sample = parse_sample(reader.record_bytes(shard, facts), facts.key)
            media = {f.member: m.data for f, m in zip(facts.media, reader.media(shard, facts))}  # noqa: B905
            kept.append((sample, media))
    for shard in shards:
        shard.path.unlink()
        index_path(shard.path).unlink()
    with ShardWriter(place, dataset, shards[0].combination, 10) as writer:
        for number, (sample, media) in enumerate(kept):
            writer.write(sample, {name: spoil(number, data) for name, data in media.items()})
    write_manifest(folder, "tests/1")


@pytest.fixture(scope="module")
def place(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A world with the base of the trained one, its data, and two damaged copies of these."""
    folder = branch(world.folder, tmp_path_factory.mktemp("data") / "world", "base")
    one = build_data(folder / "one")
    damaged(one, "img_group", lambda number, data: b"no picture" if number == 5 else data)
    many = build_data(folder / "many")
    damaged(many, "img_group", lambda _, data: data[: len(data) // 2])
    mixed = build_data(folder / "mixed")
    kinds = [("image",), (), ("speech", "image"), (), ("video",)]
    members = [m for n, kind in enumerate(kinds) for m in members_of(f"m{n}", kind)]
    foreign(mixed / "train" / "d" / "0.tar", members)
    write_manifest(mixed, "tests/1")
    return folder


def case(name: str, *extra: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "extra": [*STEPS, *extra], **more}


OTHER = "data.datasets.img_left=3.0"
CHANGE = "data.changes=[{step: 4, datasets: {img_group: 1.0, img_left: 3.0}}]"


@pytest.fixture(scope="module")
def two(place: Path) -> dict[str, Any]:
    """Runs of two processes, in one launch."""
    one, many = f"data.folder={place}/one", f"data.folder={place}/many"
    mixed = (f"data.folder={place}/mixed", "data.datasets.d=2.0")
    notes = {
        "rank-0": [5_000_001, "img_group", "img_group-00000.tar", "img_group-0003"],
        "rank-1": [5_000_000, "twins", "twins-00000.tar", "twins-0004"],
        "questions-1": [3, "spk_digit", "spk_digit-00000.tar", "spk_digit-0002"],
    }
    cases = [
        case("broken", one),
        case("broken-workers", one, "data.workers=2"),
        case("broken-parts", one, stop=6),
        case("broken-parts", one, "data.workers=1"),
        case("too-many", many, "data.quarantine_most=0"),
        case("half", stop=4),
        case("other", OTHER, copy="half"),
        case("undeclared-before", CHANGE.replace("step: 4", "step: 3"), copy="half"),
        case("changed", CHANGE, copy="half"),
        case("content", one, copy="half"),
        case("content-declared", one, "data.changes=[{step: 4}]", copy="half"),
        case("dealt", "data.deal=sharded", copy="half"),
        case("change-from-start", CHANGE),
        case("died", "trainer.evaluation.after=true", copy="half", notes=notes),
        case("mixed", *mixed),
        case("mixed-sharded", *mixed, "data.deal=sharded"),
        case("mixed-uniform", *mixed, "data.compose=uniform"),
        case("too-many", many, "data.quarantine_most=0"),
    ]
    ranks = run_distributed(f"{CASES}:runs", 2, timeout=280, folder=str(place), cases=cases)
    assert ranks[0] == ranks[1]
    names = [f"{c['name']}{' stopped' if c.get('stop') else ''}" for c in cases]
    names[-1] += " again"
    return dict(zip(names, ranks[0], strict=True))


@pytest.fixture(scope="module")
def single(place: Path, two: dict[str, Any]) -> dict[str, Any]:
    """Runs of one process."""
    cases = [case("alone"), case("alone-after-two", copy="half")]
    ranks = run_distributed(f"{CASES}:runs", 1, timeout=200, folder=str(place), cases=cases)
    return dict(zip((c["name"] for c in cases), ranks[0], strict=True))


def losses(run: dict[str, Any]) -> list[float]:
    assert not run["refused"]
    return [line["loss"] for line in run["metrics"]]


def test_a_broken_sample_costs_its_place_and_one_line(two: dict[str, Any]) -> None:
    run = two["broken"]
    assert len(losses(run)) == 8
    (line,) = run["quarantine"]
    assert (line["dataset"], line["key"], line["kind"]) == ("img_group", "img_group-0005", "broken")
    lacking = [m["step"] - 1 for m in run["metrics"] if m["samples"] != 12]
    assert lacking
    assert lacking[0] == line["step"]
    assert all(m["samples"] in (11, 12) for m in run["metrics"])


def test_workers_and_restarts_change_nothing_of_it(two: dict[str, Any]) -> None:
    for name in ("broken-workers", "broken-parts"):
        assert two[name]["quarantine"] == two["broken"]["quarantine"]
        assert losses(two[name]) == losses(two["broken"])


def test_too_many_broken_samples_stop_the_run_with_the_list(two: dict[str, Any]) -> None:
    run = two["too-many"]
    assert "more than data.quarantine_most=0 allows" in run["refused"]
    assert "quarantine.jsonl" in run["refused"]
    assert f"{run['quarantine'][-1]['key']} (broken)" in run["refused"]
    assert len(run["quarantine"]) > 8
    # Nor does it get past that by being started again.
    again = two["too-many again"]
    assert again["refused"] == run["refused"]
    assert again["quarantine"] == run["quarantine"]


def test_a_sample_that_ended_a_process_is_left_out_by_the_next(two: dict[str, Any]) -> None:
    run = two["died"]
    assert len(losses(run)) == 8
    found = [(line["step"], line["key"], line["kind"]) for line in run["quarantine"]]
    assert found == [(5, "img_group-0003", "crashed"), (5, "twins-0004", "crashed")]
    assert "Fatal Python error: Aborted" in run["quarantine"][0]["reason"]
    assert "spk_digit-0002" not in run["asked"]
    assert {"spk_digit-0001", "spk_digit-0003", "img_group-0003"} <= set(run["asked"])


def test_a_shard_of_several_combinations_is_served_as_it_is_or_refused(two: dict[str, Any]) -> None:
    assert len(losses(two["mixed"])) == 8
    assert {"loss/speech", "loss/video"} <= set(two["mixed"]["metrics"][0])
    for name in ("mixed-sharded", "mixed-uniform"):
        words = two[name]["refused"]
        assert "d: shards with several combinations can only be drawn with" in words
        assert "--rewrite" in words


def test_another_number_of_ranks_goes_on(two: dict[str, Any], single: dict[str, Any]) -> None:
    whole, rest = single["alone"], single["alone-after-two"]
    assert losses(rest) == pytest.approx(losses(whole), rel=SUMMATION)
    assert losses(rest)[:4] == losses(two["half stopped"])
    assert [m["label_tokens"] for m in rest["metrics"]] == [
        m["label_tokens"] for m in whole["metrics"]
    ]


def test_another_dealing_goes_on(two: dict[str, Any], single: dict[str, Any]) -> None:
    assert losses(two["dealt"]) == pytest.approx(losses(single["alone"]), rel=SUMMATION)


def test_another_mixture_is_refused_with_the_difference(two: dict[str, Any]) -> None:
    words = two["other"]["refused"]
    assert "was started with other settings (data.datasets." in words
    assert "data.datasets.img_left 0.7 -> 3.0" in words
    words = two["undeclared-before"]["refused"]
    assert "the data plan changed at step 4 and the recipe does not say so" in words
    assert "data.datasets.img_left was" in words


def test_a_declared_change_goes_on(two: dict[str, Any]) -> None:
    assert losses(two["changed"]) == losses(two["change-from-start"])
    assert losses(two["changed"])[4:] != losses(two["dealt"])[4:]


def test_other_content_is_refused_unless_declared(two: dict[str, Any]) -> None:
    assert "img_group (image+text) has other content" in two["content"]["refused"]
    assert len(losses(two["content-declared"])) == 8


def test_media_of_the_world_are_whole(place: Path, tmp_path: Path) -> None:
    """The damage above is the only one: its original is read without a word."""
    shutil.copytree(place / "data" / "tiny" / "train" / "img_group", tmp_path / "x")
    shard = load_index(sorted((tmp_path / "x").glob("*.tar"))[0])
    assert all(RecordReader().media(shard, sample) for sample in shard.samples)
