"""The quickstart's question set: the same bytes twice, and nothing held out is trained on."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections import Counter
from pathlib import Path

import pytest
import webdataset

from data_pipeline import build as build_module
from data_pipeline.build import build_quickstart, index_folder, main
from data_pipeline.errors import DataError
from data_pipeline.importers.emoji import EmojiTasks
from data_pipeline.importers.item import Item
from data_pipeline.importers.packages import PackageError, PackageStore
from data_pipeline.importers.sounds import INSTRUMENTS, DrumTasks
from data_pipeline.importers.speech import FLITE, STAMPS, SpokenDigits
from data_pipeline.quickstart import Quickstart
from data_pipeline.shards import rewriting
from data_pipeline.shards.index import Manifest, load_manifest
from data_pipeline.shards.integrity import VERIFIED_NAME, verify
from data_pipeline.shards.schema import Sample, Turn, parse_sample
from data_pipeline.shards.writer import ShardWriter
from tests.data_pipeline.shard_samples import foreign, members_of

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = Path(os.environ.get("UNIMOE_PACKAGES", ROOT / "cache" / "packages"))


def contents(folder: Path) -> dict[str, str]:
    """Relative path -> hash of every file that the builder makes."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != VERIFIED_NAME
    }


def records(manifest: Manifest, split: str, dataset: str) -> list[Sample]:
    shards = [str(shard.path) for shard in manifest.shards(split, dataset)]
    reader = webdataset.WebDataset(shards, shardshuffle=False)
    return [parse_sample(each["json"], each["__key__"]) for each in reader]


def quiet(message: str) -> None:
    pass


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    folder = tmp_path_factory.mktemp("digits")
    return build_quickstart(folder / "a", folder / "cache", small=True, pypi_only=True, say=quiet)


def test_two_builds_are_the_same_bytes(digits: Manifest, tmp_path: Path) -> None:
    again = build_quickstart(tmp_path / "b", tmp_path, small=True, pypi_only=True, say=quiet)
    assert contents(again.folder) == contents(digits.folder)
    other = build_quickstart(tmp_path / "c", tmp_path, 1, small=True, pypi_only=True, say=quiet)
    assert other.digest != digits.digest


def test_digits_make_every_picture_and_video_task(digits: Manifest) -> None:
    assert set(digits.datasets["train"]) == {
        "img_digit",
        "img_count",
        "img_left",
        "vid_dir",
        "twins",
    }
    assert digits.datasets["test"]["vid_dir"].combination == "video+text"
    (shard,) = digits.shards("test", "vid_dir")
    assert all(sample.media[0].frames == 8 for sample in shard.samples)
    assert_answers_are_taught(digits)


def assert_answers_are_taught(manifest: Manifest) -> None:
    for split in ("val", "test"):
        for dataset in manifest.datasets[split]:
            if dataset == "glosses":  # plain text, no closed answers
                continue
            asked, taught = (
                Counter(sample.turns[-1].text for sample in records(manifest, each, dataset))
                for each in (split, "train")
            )
            assert set(asked) <= set(taught), (split, dataset)
            facts = manifest.datasets[split][dataset]
            assert facts.answers == len(asked)
            assert facts.samples == asked.total()
            assert facts.majority == round(max(asked.values()) / asked.total(), 4)


def test_a_finished_folder_is_reused_and_other_options_rebuild(tmp_path: Path) -> None:
    out = tmp_path / "data"

    def build(seed: int) -> Manifest:
        return build_quickstart(out, tmp_path, seed, small=True, pypi_only=True, say=quiet)

    first = build(0)
    identity = out.stat().st_ino
    assert build(0).digest == first.digest
    assert out.stat().st_ino == identity
    assert build(1).digest != first.digest
    assert {path.name for path in tmp_path.iterdir()} == {"data", "data.lock"}


def test_a_killed_build_leaves_nothing_behind(
    digits: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, out = build_module._write_task, tmp_path / "data"

    def killed(task, folder: Path, seed: int) -> None:
        if task.name == "vid_dir":
            raise KeyboardInterrupt
        real(task, folder, seed)

    monkeypatch.setattr(build_module, "_write_task", killed)
    with pytest.raises(KeyboardInterrupt):
        build_quickstart(out, tmp_path, small=True, pypi_only=True, say=quiet)
    assert not out.exists()
    (tmp_path / "data.partial" / "train" / "stray").mkdir(parents=True)
    monkeypatch.setattr(build_module, "_write_task", real)
    build_quickstart(out, tmp_path, small=True, pypi_only=True, say=quiet)
    assert contents(out) == contents(digits.folder)


def test_a_folder_of_something_else_is_not_touched(tmp_path: Path, capsys) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    command = ["quickstart", "--out", str(tmp_path), "--packages", str(tmp_path / "p")]
    assert main([*command, "--small", "--pypi-only"]) == 1
    assert "exists and is no data set" in capsys.readouterr().err
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_a_damaged_finished_folder_is_refused(tmp_path: Path) -> None:
    options = {"small": True, "pypi_only": True, "say": quiet}
    manifest = build_quickstart(tmp_path / "d", tmp_path, **options)
    (manifest.folder / manifest.entries[0].path).unlink()
    with pytest.raises(DataError, match="is missing; restore it or build"):
        build_quickstart(tmp_path / "d", tmp_path, **options)


def test_an_answer_that_was_never_taught_is_refused() -> None:
    items = [Item("val", "?", "a"), Item("val", "?", "b")]
    build_module._refuse_untaught("t", "val", items, {"a", "b"})
    with pytest.raises(DataError, match="t: the val answer 'b' never occurs in train"):
        build_module._refuse_untaught("t", "val", items, {"a"})


def test_shards_from_elsewhere_can_be_described(tmp_path: Path, capsys) -> None:
    with ShardWriter(tmp_path / "train" / "mine", "mine", "text") as writer:
        writer.write(Sample("k", "mine", (Turn("human", "?"), Turn("gpt", "!"))), {})
    assert main(["index", str(tmp_path)]) == 0
    assert "samples train 1" in capsys.readouterr().out
    assert main(["index", str(tmp_path / "train")]) == 1


def mixed_set(folder: Path) -> dict[str, list[bytes]]:
    """One mixed and one plain foreign shard; returns every sample's members' bytes by key."""
    wanted = [
        ("a", ("image",)),
        ("b", ()),
        ("c", ("image", "speech")),
        ("d", ()),
        ("e", ("image",)),
    ]
    samples = {key: members_of(key, modalities) for key, modalities in wanted}
    place = folder / "train" / "d"
    foreign(place / "x.tar", [member for key in "abcd" for member in samples[key]])
    foreign(place / "y.tar", samples["e"])
    return {key: [data for _, data in members] for key, members in samples.items()}


def served(manifest: Manifest) -> dict[str, list[bytes]]:
    """The same through the index, from the tars that the manifest names."""
    found = {}
    for shard in manifest.shards("train"):
        data = shard.path.read_bytes()
        for sample in shard.samples:
            places = [(sample.json_offset, sample.json_size)]
            places += [(medium.offset, medium.size) for medium in sample.media]
            assert sample.key not in found, "served twice"
            found[sample.key] = [data[offset:][:size] for offset, size in places]
    return found


def test_mixed_shards_are_indexed_and_rewritten_on_demand(tmp_path: Path, capsys) -> None:
    folder = tmp_path / "set"
    samples = mixed_set(folder)
    assert main(["index", str(folder)]) == 0
    assert (
        "train/d/x.tar: holds several combinations, so that it is served under data.deal=balanced "
        "with data.compose=mixed only" in capsys.readouterr().out
    )
    before = load_manifest(folder)
    assert [entry.combination for entry in before.entries] == ["mixed", "image+text"]
    assert served(before) == samples
    facts = before.datasets["train"]["d"]
    assert facts.combination == "image+speech+text image+text text"
    assert main(["index", str(folder), "--rewrite"]) == 0
    assert "x.tar: rewritten, one shard per combination" in capsys.readouterr().out
    after = load_manifest(folder)
    assert [(entry.path, entry.combination) for entry in after.entries] == [
        ("train/d/x.by-combination/x-image-speech-text.tar", "image+speech+text"),
        ("train/d/x.by-combination/x-image-text.tar", "image+text"),
        ("train/d/x.by-combination/x-text.tar", "text"),
        ("train/d/y.tar", "image+text"),
    ]
    assert served(after) == samples
    assert (after.counts, after.datasets) == (before.counts, before.datasets)
    assert not list(folder.glob("train/d/x.*r")) + list(folder.glob("train/d/x.index"))
    assert main(["index", str(folder), "--rewrite"]) == 0
    assert load_manifest(folder) == after


@pytest.mark.parametrize("indexed_before", [False, True])
@pytest.mark.parametrize(
    ("name", "call"), [("build_index", 1), ("build_index", 2), ("write_manifest", 1), ("unlink", 1)]
)
def test_a_killed_rewriting_leaves_the_old_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, call: int, indexed_before: bool
) -> None:
    folder = tmp_path / "set"
    samples = mixed_set(folder)
    if indexed_before:
        index_folder(folder, say=quiet)
    place = {"build_index": rewriting, "write_manifest": build_module, "unlink": Path}[name]
    real, calls = getattr(place, name), []

    def killed(*arguments, **options):
        calls.append(arguments)
        if len(calls) == call and arguments[0].suffix != ".lock":
            raise KeyboardInterrupt
        return real(*arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(place, name, killed)
        with pytest.raises(KeyboardInterrupt):
            index_folder(folder, rewrite=True, say=quiet)
    if indexed_before:  # the manifest that is there can still be served
        assert served(load_manifest(folder)) == samples
        verify(folder)
    assert served(index_folder(folder, say=quiet)) == samples
    after = index_folder(folder, rewrite=True, say=quiet)
    assert served(after) == samples
    assert "mixed" not in {entry.combination for entry in after.entries}
    assert {path.name for path in (folder / "train" / "d").iterdir()} == {
        *("x.by-combination", "y.tar", "y.index")
    }


def test_what_cannot_be_indexed_is_told(tmp_path: Path, capsys) -> None:
    def refused(folder: Path) -> str:
        assert main(["index", str(folder)]) == 1
        return capsys.readouterr().err

    members = members_of("a")
    foreign(tmp_path / "gz" / "train" / "d" / "x.tar.gz", members, "w:gz")
    assert "x.tar.gz is compressed; a shard is read by offsets" in refused(tmp_path / "gz")
    foreign(tmp_path / "named" / "train" / "d" / "x.tar", members, "w:gz")
    assert "x.tar is compressed with gzip" in refused(tmp_path / "named")
    for name in "xy":
        foreign(tmp_path / "twice" / "train" / "d" / f"{name}.tar", members)
    assert "y.tar: sample 'a' is in" in refused(tmp_path / "twice")
    assert "is no folder" in refused(tmp_path / "nothing")


def test_a_folder_of_an_older_version_is_built_again(tmp_path: Path) -> None:
    options = {"small": True, "pypi_only": True, "say": quiet}
    first = build_quickstart(tmp_path / "d", tmp_path, **options)
    path = first.folder / "manifest.json"
    old = {**json.loads(path.read_text()), "version": 1, "builder": "quickstart/2"}
    path.write_text(json.dumps(old))
    with pytest.raises(DataError, match=r"format 1, this version reads 2; build .* again"):
        verify(first.folder)
    assert build_quickstart(tmp_path / "d", tmp_path, **options) == first
    path.write_text(json.dumps({**old, "builder": "mine/1"}))
    with pytest.raises(DataError, match="was made by mine/1; choose another folder"):
        build_quickstart(tmp_path / "d", tmp_path, **options)


class Lacking(PackageStore):
    """A store in which some packages cannot be had."""

    lacking: tuple[str, ...] = ()

    def get(self, name: str) -> Path:
        if not self.lacking or name in self.lacking:
            raise PackageError(name, "no network")
        return super().get(name)


def test_without_any_package_digits_remain_and_the_notes_say_why(tmp_path: Path) -> None:
    plan = Quickstart(Lacking(tmp_path), seed=0, small=True, pypi_only=False)
    names = [task.name for task in plan.tasks]
    assert names == ["img_digit", "img_count", "img_left", "vid_dir", "twins"]
    assert len(plan.notes) == 5
    for package in ("unicode-data", "hydrogen-data", STAMPS, "miscfiles", "wordnet-base"):
        assert any(f"package {package} cannot be fetched: no network" in n for n in plan.notes)


# --- the rest needs the Debian packages -----------------------------------------------------


@pytest.fixture(scope="module")
def store() -> PackageStore:
    store = PackageStore(PACKAGES)
    try:
        for name in ("unicode-data", "fonts-noto-color-emoji", "hydrogen-drumkits", STAMPS):
            store.get(name)
        store.programs(FLITE)
    except PackageError as error:
        pytest.skip(str(error))
    return store


def test_one_missing_package_costs_its_tasks_only(store: PackageStore) -> None:
    lacking = Lacking(PACKAGES)
    lacking.lacking = ("hydrogen-drumkits", FLITE)
    plan = Quickstart(lacking, seed=0, small=True, pypi_only=False)
    names = {task.name for task in plan.tasks}
    assert names == {
        *("img_group", "img_count", "img_left", "vid_dir"),
        *("spk_digit", "txt_cap", "glosses", "twins"),
    }
    assert len(plan.notes) == 2


def test_the_debian_build(store: PackageStore, tmp_path: Path) -> None:
    manifest = build_quickstart(tmp_path / "d", PACKAGES, small=True, say=quiet)
    assert manifest.notes == ()
    assert set(manifest.datasets["test"]) == {
        *("img_group", "img_count", "img_left", "vid_dir"),
        *("spk_qa", "spk_digit", "aud_drum", "txt_cap"),
    }
    assert set(manifest.datasets["val"]) == {*manifest.datasets["test"], "twins", "glosses"}
    assert set(manifest.datasets["train"]) == {*manifest.datasets["val"], "spk_asr"}
    assert_answers_are_taught(manifest)
    assert manifest.packages["flite"]
    for split in manifest.splits():
        for shard in manifest.shards(split, "spk_qa"):
            assert all(800 < sample.media[0].duration_ms < 4000 for sample in shard.samples)
    heard = records(manifest, "train", "spk_asr")
    assert all(sample.turns[1].text.startswith("What is the capital of") for sample in heard)
    speech = {sample.turns[-1].text: sample for sample in records(manifest, "train", "spk_qa")}
    written = records(manifest, "train", "txt_cap")
    assert {sample.turns[-1].text for sample in written} == set(speech)


def sources(items: list[Item]) -> dict[str, set[str]]:
    return {
        split: {item.source for item in items if item.split == split}
        for split in ("train", "val", "test")
    }


def assert_disjoint(groups: dict[str, set[str]]) -> None:
    assert all(groups.values())
    for first, second in itertools.combinations(groups.values(), 2):
        assert not first & second


def test_every_small_task_holds_its_sources_out(store: PackageStore) -> None:
    plan = Quickstart(store, seed=0, small=True, pypi_only=False)
    emoji = dict[str, set[str]]()
    for task in plan.tasks:
        if task.name in ("twins", "glosses", "spk_asr"):
            continue
        found = sources(list(task.items()))
        assert_disjoint(found)
        if task.name in ("img_group", "img_count", "vid_dir"):
            for split, names in found.items():
                emoji[split] = emoji.get(split, set()) | names
    assert_disjoint(emoji)  # also across tasks


@pytest.mark.parametrize("seed", [0, 1])
def test_the_full_size_splits(store: PackageStore, seed: int) -> None:
    emoji = EmojiTasks(store, seed, small=False)
    names = {split: {e.name for e in part} for split, part in emoji.splits.items()}
    assert_disjoint(names)
    assert len(names["train"]) > 900
    assert len(names["test"]) > 250
    pairs = {split: {frozenset(pair) for pair in part} for split, part in emoji.pairs().items()}
    assert_disjoint(pairs)
    trained = {e.name for pair in pairs["train"] for e in pair}
    assert len(trained) == 40
    assert trained <= names["train"]


def test_the_full_size_recordings(store: PackageStore) -> None:
    digits = SpokenDigits(store, small=False)._digits
    counts = Counter(digit.split for digit in digits)
    assert counts["test"] >= 80
    assert counts["val"] >= 40
    for split in counts:
        assert {d.digit for d in digits if d.split == split} == set(range(10))
    hits = DrumTasks(store, small=False)._hits
    for split, least in (("train", 200), ("val", 40), ("test", 100)):
        part = Counter(hit.instrument for hit in hits if hit.split == split)
        assert part.total() >= least
        assert set(part) == set(INSTRUMENTS)
        assert max(part.values()) / part.total() < 0.35
