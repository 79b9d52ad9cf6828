"""``python -m data_pipeline.inspect``: what it counts is there, what it foretells comes true."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data_pipeline.build import index_folder
from data_pipeline.inspect import main
from data_pipeline.inspection import texts as texts_module
from data_pipeline.inspection.contents import read_contents
from data_pipeline.inspection.figure import Panel, Series, draw
from data_pipeline.inspection.outlook import mixtures
from data_pipeline.inspection.samples import glance, sources_of
from data_pipeline.inspection.texts import Texts, read_texts
from data_pipeline.planning.catalogue import open_catalogue
from data_pipeline.planning.cost import CostModel
from data_pipeline.planning.dealer import Dealer
from data_pipeline.planning.dealing import Ranks
from data_pipeline.planning.timeline import Timeline
from data_pipeline.reading.records import RecordReader
from data_pipeline.shards.index import index_path, load_manifest
from data_pipeline.shards.schema import combination_of
from tests.data_pipeline.cases_loading import catalogue_of, rule, tokenizer_of
from tests.data_pipeline.published import address
from tests.data_pipeline.shard_samples import foreign, make, members_of, write
from tests.workspace import DATASETS, build_data, overrides, questions
from unimoe_mcore.config.composition import compose_recipe

MODALITIES = {"image", "video", "speech", "audio"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three datasets in two splits; one holds a mixed shard, a broken and an empty recording."""
    place = tmp_path_factory.mktemp("inspect") / "set"
    talk = [make(f"t{i}", ("speech", "image"), "talk") for i in range(9)]
    write(place / "train" / "talk", talk, max_samples=4)
    write(place / "val" / "talk", talk[:2])
    write(place / "train" / "plain", [make(f"p{i}", (), "plain") for i in range(30)])
    samples = [("a", ()), ("b", ("image",)), ("c", ("video", "speech")), ("e", ("speech",))]
    members = [member for key, modalities in samples for member in members_of(key, modalities)]
    broken = [(name, b"RIFF" if name == "e.0.wav" else data) for name, data in members]
    foreign(place / "train" / "d" / "x.tar", broken)
    index_folder(place, say=lambda text: None)
    return place


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny world's data and the tokenizer of a base."""
    place = tmp_path_factory.mktemp("world")
    build_data(place / "data" / "tiny")
    gives = place / "runs" / "base" / "gives"
    gives.mkdir(parents=True)
    tokenizer_of(place).save(gives / "tokenizer.json")
    return place


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures go into the current folder."""
    monkeypatch.chdir(tmp_path)


def told(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> dict[str, Any]:
    """The JSON object that the command prints."""
    assert main([*map(str, arguments), "--json"]) == 0
    printed: dict[str, Any] = json.loads(capsys.readouterr().out)
    return printed


def files(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in folder.rglob("*")}


def counted(folder: Path) -> dict[tuple[str, str, str], Counter[str]]:
    """The same counts, sample by sample."""
    found: dict[tuple[str, str, str], Counter[str]] = {}
    manifest = load_manifest(folder)
    for split in manifest.splits():
        for shard in manifest.shards(split):
            for sample in shard.samples:
                name = combination_of(medium.modality for medium in sample.media)
                count = found.setdefault((split, shard.dataset, name), Counter())
                count["samples"] += 1
                count["bytes"] += sample.json_size + sum(m.size for m in sample.media)
                for medium in sample.media:
                    count[medium.modality] += 1
                    count["ms"] += medium.duration_ms
                    count["frames"] += medium.frames
    return found


def test_counts_are_those_of_the_indexes(folder: Path) -> None:
    before = files(folder)
    contents = read_contents(load_manifest(folder))
    assert files(folder) == before
    groups = {(g.split, g.dataset, g.combination): g for g in contents.groups}
    expected = counted(folder)
    assert set(groups) == set(expected)
    for name, group in groups.items():
        count = expected[name]
        assert (group.samples, group.bytes) == (count["samples"], count["bytes"])
        assert group.media == {m: count[m] for m in MODALITIES if count[m]}
        seconds = sum(group.total(each) for each in ("speech", "audio", "video"))
        assert seconds == pytest.approx(count["ms"] / 1000)
        assert group.total("frames") == count["frames"]
        assert group.texts_read == group.samples
    mixed = {g.combination: (g.shards, g.mixed, g.headless) for g in groups.values() if g.mixed}
    assert mixed == {
        "text": (1, 1, 0),
        "image+text": (1, 1, 0),
        "video+speech+text": (1, 1, 0),
        "speech+text": (1, 1, 1),
    }
    assert groups["train", "talk", "image+speech+text"].shards == 3


def test_lengths_are_those_of_the_samples(folder: Path) -> None:
    contents = read_contents(load_manifest(folder), ["train"])
    plain, talk = (
        next(g for g in contents.groups if g.dataset == name) for name in ("plain", "talk")
    )
    expected = [len("What?") + len(f"Ünicode p{i}") for i in range(30)]
    assert sorted(plain.lengths["text"]) == sorted(expected)
    assert plain.summary()["text"] == {
        "smallest": 15.0,
        "median": 16.0,
        "mean": round(sum(expected) / 30, 3),
        "largest": 16.0,
    }
    assert talk.summary()["speech"] == dict.fromkeys(("smallest", "median", "mean", "largest"), 1.3)
    assert set(talk.lengths["text"]) == {len("What?") + len("Ünicode t0")}  # no placeholders


@given(st.integers(1, 5000), st.integers(1, 400))
def test_texts_that_were_read_stand_for_equal_stretches(count: int, most: int) -> None:
    kept = texts_module.MOST_TEXTS
    texts_module.MOST_TEXTS = most
    try:
        rows = texts_module._picked(count)
    finally:
        texts_module.MOST_TEXTS = kept
    assert len(rows) == min(count, most)
    assert (np.diff(rows) > 0).all()
    spread = Texts(rows, count, []).spread(rows)
    assert len(spread) == count
    assert (spread[rows] == rows).all()  # a sample that was read stands for itself
    each = np.unique(spread, return_counts=True)[1]
    assert each.max() - each.min() <= 1


def test_large_datasets_are_sampled(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(texts_module, "MOST_TEXTS", 5)
    shards = load_manifest(folder).shards("train", "talk")
    read = read_texts(shards, RecordReader())
    assert (len(read.conversations), read.count) == (5, 9)
    for row, turns in zip(read.rows, read.conversations, strict=True):
        assert turns[-1].text == f"Ünicode t{row}"  # also across shards
    assert main([str(folder)]) == 0
    assert "Lengths of texts: 16 of 45 were read" in capsys.readouterr().out


def test_the_tables_are_plain_and_narrow(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(folder)]) == 0
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert max(map(len, lines)) <= 100
    assert "\x1b" not in printed
    row = next(line.split() for line in lines if line.split()[:1] == ["plain"])
    assert row[:4] == ["plain", "text", "30", "1"]
    assert row[-2:] == ["30", "3.3%"]  # answers and majority
    assert "1 recordings or clips have no length" in printed
    assert "train/d: shards with several combinations" in printed
    assert main([str(folder), "--split", "val", "--dataset", "talk"]) == 0
    assert "plain" not in capsys.readouterr().out


def test_notes_cannot_speak_to_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "s" / "train" / "d", [make("a")])
    index_folder(tmp_path / "s", say=lambda text: None)
    manifest = tmp_path / "s" / "manifest.json"
    record = json.loads(manifest.read_text())
    record["notes"] = ["without \x1b[31mdrums [bold]"]
    manifest.write_text(json.dumps(record))
    assert main([str(tmp_path / "s")]) == 0
    assert "note: without ?[31mdrums [bold]" in capsys.readouterr().out


def test_the_picture_lies_beside_the_set(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = files(folder)
    assert told(capsys, folder)["picture"] == "set-lengths.png"
    with Image.open("set-lengths.png") as picture:
        assert picture.width == 1200
        pixels = np.asarray(picture.convert("RGB"))
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20  # something is drawn
    assert os.listdir() == ["set-lengths.png"]
    for place, words in ((folder / "x.png", "inside the data set"), (Path("x.jpg"), "in .png")):
        assert main([str(folder), "--picture", str(place)]) == 1
        assert words in capsys.readouterr().err
    assert main([str(folder), "--dataset", "plain", "--picture", "a/b.png"]) == 0
    assert Path("a/b.png").is_file()
    assert files(folder) == before


@pytest.mark.parametrize(
    "values", [[8.0], [0.0, 1.0], [1.0, 1e6], [0.25], [0.001, 900.5], list(range(7))]
)
def test_any_lengths_can_be_drawn(values: list[float], tmp_path: Path) -> None:
    series = Series("train", np.array(values), np.ones(len(values)))
    draw([Panel("text", "x", (series,))], "title", "caption", tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 1000


ERRORS: dict[str, tuple[list[str], str]] = {
    "no folder": (["nowhere"], "does not exist"),
    "no manifest": (["."], "does not exist"),
    "split": (["SET", "--split", "dev"], "has no split 'dev'; it has train, val"),
    "dataset": (["SET", "--dataset", "x"], "has no dataset 'x'; it has d, plain, talk"),
    "recipe": (["SET", "--recipe", "stage9"], "There is no recipe 'stage9'"),
    "key": (["SET", "--recipe", "stage1", "data.x=1"], "there is no such key"),
    "lacking": (["SET", "--recipe", "base"], "holds no train/twins"),
    "none": (["SET", "--recipe", "base", "data.missing=skip"], "none of the datasets"),
    "tower": (["SET", "--recipe", "base", "data.datasets.talk=1", "data.missing=skip"], "no tower"),
    "costs": (
        ["SET", "--recipe", "base", "data.datasets.plain=1", "data.missing=skip", "data.costs=no"],
        "calibrate",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_what_cannot_be_shown_is_one_sentence(
    case: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, words = ERRORS[case]
    assert main([str(folder) if each == "SET" else each for each in arguments]) == 1
    error = capsys.readouterr().err
    assert words in error
    assert error.startswith("error: ")
    assert len(error.splitlines()) == 1


def test_damage_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tar,) = write(tmp_path / "s" / "train" / "d", [make("a")])
    index_folder(tmp_path / "s", say=lambda text: None)
    manifest = tmp_path / "s" / "manifest.json"
    whole = manifest.read_text()
    for place, content, words in (
        (index_path(tar), b"x" * 99, "is no index or damaged"),
        (manifest, b"{", "cannot be read"),
        (manifest, whole.replace('"version": 2', '"version": 1').encode(), "has format 1"),
        (tar, b"\0" * tar.stat().st_size, "index"),
    ):
        kept = place.read_bytes()
        place.write_bytes(content)
        assert main([str(tmp_path / "s")]) == 1
        error = capsys.readouterr().err
        assert words in error
        assert len(error.splitlines()) == 1
        place.write_bytes(kept)
    assert main([str(tmp_path / "s")]) == 0


def recipe_of(world: Path, *more: str) -> list[str]:
    return ["--recipe", "stage1", *overrides(world), "trainer.steps=90", *more]


CASES = {
    "mixed": [],
    "uniform": ["data.compose=uniform"],
    "sharded": ["data.deal=sharded", "parallel.processes=6"],
    "narrow": ["data.tokens_per_microbatch=40", "data.pad_to=5"],
    "changed": ["data.changes=[{step: 20, temperature: 0.0, global_samples: 30}]"],
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_foretold_comes_true(
    case: str, world: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_pipeline.inspection.outlook._STEPS", 90)
    arguments = recipe_of(world, *CASES[case])
    found = told(capsys, world / "data" / "tiny", *arguments)
    recipe = compose_recipe("stage1", arguments[2:])
    catalogue, last = trained_on(world, recipe.data.datasets), 90
    timeline = Timeline(catalogue.sources, mixtures(recipe.data, DATASETS))
    ranks = Ranks(recipe.parallel.processes, 1, recipe.data.tokens_per_microbatch)
    dealer = Dealer(catalogue, timeline, CostModel(), ranks, recipe.data.deal)
    assert found["refusals"] == []
    total = np.zeros(len(catalogue.sources))
    for phase in found["phases"]:
        steps = range(phase["first"], phase["end"])
        samples, tokens, works = (np.zeros(len(catalogue.sources)) for _ in range(3))
        micro, places = [], 0
        for step in steps:
            rows, dealt = dealer.step(step)
            number = catalogue.source_of(rows)
            samples += np.bincount(number, minlength=len(samples))
            tokens += np.bincount(number, catalogue.tokens[rows], len(samples))
            works += np.bincount(number, catalogue.work[rows].sum(1), len(samples))
            micro.append(dealt.microbatches)
            for rank in range(ranks.count):
                for part in dealt.of(rank):
                    used, pad = int(catalogue.tokens[rows[part]].sum()), recipe.data.pad_to
                    places += max(1, -(-used // pad)) * pad
        total += samples
        drawn = {(d["dataset"], d["combination"]): d for d in phase["drawn"]}
        for number, source in enumerate(catalogue.sources):
            each = drawn[source.dataset, source.combination]
            assert each["samples"] * len(steps) == pytest.approx(samples[number], rel=0.1, abs=13)
            assert each["tokens"] * len(steps) == pytest.approx(tokens[number], rel=0.12, abs=300)
            assert sum(each["work"].values()) * len(steps) == pytest.approx(
                works[number], rel=0.12, abs=60
            )
            assert each["epochs"] == pytest.approx(total[number] / source.count)
        layout = phase["layout"]
        assert layout["microbatches"] == [min(micro), pytest.approx(np.mean(micro)), max(micro)]
        assert layout["padding"] == pytest.approx(1 - tokens.sum() / places)
        assert layout["tokens"] == pytest.approx(tokens.sum() / sum(micro) / ranks.count)
        assert sum(d["share"] for d in phase["drawn"]) == pytest.approx(1)
        assert sum(d["token_share"] for d in phase["drawn"]) == pytest.approx(1)
    assert found["phases"][-1]["end"] == last
    assert "144 of 144 texts were read" in found["remarks"][0]


def trained_on(world: Path, datasets: dict[str, float]) -> Any:
    """The catalogue that a run of the recipe has."""
    return open_catalogue(
        load_manifest(world / "data" / "tiny"),
        "train",
        [name for name in datasets if name in DATASETS],
        tokenizer_of(world),
        rule(world),
        world / "cache",
    )


def test_all_texts_read_make_the_catalogue_of_a_run(world: Path, tmp_path: Path) -> None:
    manifest, real = load_manifest(world / "data" / "tiny"), catalogue_of(world)
    sources = sources_of(manifest, DATASETS, MODALITIES)
    seen = glance(sources, tokenizer_of(world), rule(world), RecordReader(), tmp_path)
    assert seen.texts_read == len(real)
    assert seen.catalogue.sources == real.sources  # so that the plan is the run's, to the sample
    assert (seen.catalogue.tokens == real.tokens).all()
    assert (seen.catalogue.work == real.work).all()


def test_without_a_tokenizer_tokens_are_estimated(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there = told(capsys, world / "data" / "tiny", *recipe_of(world))
    gone = told(capsys, world / "data" / "tiny", *recipe_of(world, "stage.base=nowhere"))
    assert "counted with" in there["remarks"][0]
    assert "estimated, since there is no nowhere/tokenizer.json yet" in gone["remarks"][0]
    twins = next(d for d in gone["phases"][0]["drawn"] if d["dataset"] == "twins")
    expected = [
        1 + (1 + -(-len(question) // 4)) + (1 + -(-len(answer) // 4))
        for question, answer, _ in questions("twins", "train")
    ]
    assert twins["tokens_each"] == pytest.approx(sum(expected) / len(expected))
    assert twins["longest"] == max(expected)
    for one, other in zip(there["phases"][0]["drawn"], gone["phases"][0]["drawn"], strict=True):
        assert one["samples"] == other["samples"]


def test_what_a_run_would_refuse_is_said(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = str(world / "data" / "tiny")
    assert main([tiny, *recipe_of(world, "data.tokens_per_microbatch=8")]) == 0
    printed = capsys.readouterr().out
    assert "A run would be refused: the longest sample has 31 tokens, more than" in printed
    assert "data-parallel rank" not in printed
    late = "data.changes=[{step: 90, temperature: 1.0}]"
    assert main([tiny, *recipe_of(world, late)]) == 0
    assert "change at step 90 comes after the last step" in capsys.readouterr().out


def test_mixed_shards_are_refused_where_a_run_refuses_them(
    folder: Path, world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = ["data.datasets.d=1", "data.datasets.plain=1", "data.tokens_per_microbatch=512"]
    served = told(capsys, folder, *recipe_of(world, *chosen))
    assert [d["combination"] for d in served["phases"][0]["drawn"]] == ["mixed", "text"]
    refused = told(capsys, folder, *recipe_of(world, *chosen, "data.deal=sharded"))
    assert "d has shards with several combinations" in refused["refusals"][0]


def test_measured_costs_give_the_encoders_share(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    costs = CostModel(1.0, 0.0, {"image": 50.0, "speech": 10.0}, "measured")
    costs.save(Path("costs.json"))
    arguments = [world / "data" / "tiny", *recipe_of(world, "data.costs=costs.json")]
    phase = told(capsys, *arguments)["phases"][0]
    work = Counter[str]()
    for each in phase["drawn"]:
        work.update(each["work"])
    encoders = 50 * work["image"] + 10 * work["speech"]
    assert phase["encoders"] == pytest.approx(encoders / (encoders + phase["tokens"]))
    speech = next(each for each in phase["drawn"] if each["dataset"] == "spk_digit")
    assert speech["encoder_share"] == pytest.approx(10 * work["speech"] / encoders)
    assert main([str(each) for each in arguments]) == 0
    assert "of all work, by the recipe's costs" in capsys.readouterr().out


def test_of_a_set_elsewhere_as_little_as_possible_is_fetched(
    server: Any, world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = told(capsys, address(server))
    assert (found["picture"], found["groups"][0]["texts_read"]) == ("set-lengths.png", 0)
    assert found["groups"][0]["samples"] == 12
    assert not [path for path in server.requests if path.endswith(".tar")]
    more = ["data.datasets.spk=1", f"paths.scratch={Path('scratch').absolute()}"]
    found = told(capsys, address(server), *recipe_of(world, *more))
    assert found["phases"][0]["drawn"][0]["count"] == 12
    assert len([path for path in server.requests if path.endswith(".tar")]) == 1


def test_the_command_needs_no_torch(folder: Path) -> None:
    code = (
        "import sys; from data_pipeline.inspect import main;"
        "code = main(sys.argv[1:]); sys.exit(code or 9 * ('torch' in sys.modules))"
    )
    ran = [sys.executable, "-c", code, str(folder), "--split", "val"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    assert subprocess.run(ran, timeout=120, env=environment).returncode == 0
