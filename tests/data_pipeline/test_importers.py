"""Importers: what they make is what they say, and packages are unpacked safely."""

from __future__ import annotations

import io
import itertools
import random
import shutil
import subprocess
import tarfile
from collections import Counter
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data_pipeline.errors import DataError
from data_pipeline.importers import pictures
from data_pipeline.importers.capitals import TEST_QUESTION, TWIN_QUESTIONS, VAL_QUESTION, Country
from data_pipeline.importers.digits import DigitTasks, label, read_digits
from data_pipeline.importers.emoji import Emoji, read_emoji, split_emoji
from data_pipeline.importers.item import Item, three_way
from data_pipeline.importers.packages import PackageError, PackageStore, library_path, unpack_tar
from data_pipeline.importers.pictures import Drawing, count_items, move_items, pair_item
from data_pipeline.importers.recording import read_mono, wav
from data_pipeline.importers.sounds import find_hits
from data_pipeline.importers.speech import find_prompt_digits, find_stamp_digits
from data_pipeline.importers.text import (
    capital_task,
    capital_twin,
    emoji_twins,
    read_glosses,
    twin_task,
)

RED = Drawing("red", Image.new("RGBA", (136, 128), (255, 0, 0, 255)))
BLUE = Drawing("blue", Image.new("RGBA", (136, 128), (0, 0, 255, 255)))


def red_pixels(data: bytes | Image.Image) -> np.ndarray:
    image = data if isinstance(data, Image.Image) else Image.open(io.BytesIO(data))
    pixels = np.asarray(image.convert("RGB")).astype(int)
    return (pixels[..., 0] > 200) & (pixels[..., 1] < 90)


@given(st.lists(st.integers(), min_size=3, max_size=60, unique=True), st.integers())
def test_three_way_divides(things: list[int], seed: int) -> None:
    parts = three_way(things, random.Random(seed), val=0.1, test=0.2)
    assert sorted(itertools.chain(*parts.values())) == sorted(things)
    assert all(parts.values())
    assert abs(len(parts["test"]) - 0.2 * len(things)) <= 1


def test_as_many_drawings_as_the_answer_says() -> None:
    items = list(count_items({"train": [RED]}, {"train": 30}, random.Random(0)))
    assert {item.answer for item in items} == {"1", "2", "3", "4", "5", "6"}
    for item in items:
        area = red_pixels(item.media[0].data).sum()
        assert round(area / 46**2) == int(item.answer)


def test_the_left_drawing_is_on_the_left() -> None:
    item = pair_item("val", "?", RED, BLUE, "red", random.Random(0))
    columns = np.nonzero(red_pixels(item.media[0].data))[1]
    assert columns.max() < 144
    assert item.source == "blue | red"


def test_clips_decode_and_move_the_way_the_answer_says() -> None:
    items = list(move_items({"train": [RED]}, {"train": 12}, random.Random(0)))
    assert {item.answer for item in items} == set(pictures.DIRECTIONS)
    for item in items:
        with av.open(io.BytesIO(item.media[0].data)) as container:
            frames = [frame.to_image() for frame in container.decode(video=0)]
        assert [frame.size for frame in frames] == [(160, 160)] * 8
        centres = np.array([np.argwhere(red_pixels(frame)).mean(axis=0) for frame in frames])
        down, across = np.diff(centres, axis=0).mean(axis=0)
        expected = pictures.DIRECTIONS[item.answer]
        assert (round(across / 10), round(down / 10)) == expected
    again = list(move_items({"train": [RED]}, {"train": 12}, random.Random(0)))
    assert items == again


def test_recordings_become_short_mono_wav(tmp_path: Path) -> None:
    rate = 8000
    stereo = np.stack([np.full(5 * rate, 0.5), np.full(5 * rate, -0.25)], axis=1)
    soundfile.write(tmp_path / "a.flac", stereo, rate)
    samples, read_rate = read_mono(tmp_path / "a.flac")
    assert (len(samples), read_rate, samples.dtype) == (4 * rate, rate, np.int16)
    assert abs(int(samples[100]) - 4096) <= 1
    info = soundfile.info(io.BytesIO(wav("audio", samples, rate).data))
    assert (info.format, info.subtype, info.channels, info.duration) == ("WAV", "PCM_16", 1, 4.0)
    (tmp_path / "bad.wav").write_bytes(b"RIFF nonsense")
    with pytest.raises(DataError, match=r"bad\.wav cannot be decoded"):
        read_mono(tmp_path / "bad.wav")


TABLE = """# group: Smileys & Emotion
1F600                ; fully-qualified     # X E1.0 grinning face
263A FE0F            ; fully-qualified     # X E0.6 smiling face
263A                 ; unqualified         # X E0.6 smiling face
1F468 200D 1F373     ; fully-qualified     # X E4.0 man cook
# group: Food & Drink
1F34E                ; fully-qualified     # X E0.6 red apple
# group: Flags
1F3C1                ; fully-qualified     # X E0.6 chequered flag
"""


def test_emoji_of_one_code_point_are_read(tmp_path: Path) -> None:
    path = tmp_path / "emoji-test.txt"
    path.write_text(TABLE, "utf-8")
    assert read_emoji(path) == [
        Emoji("\U0001f600", "grinning face", "Smileys"),
        Emoji("\u263a", "smiling face", "Smileys"),
        Emoji("\U0001f34e", "red apple", "Food"),
    ]
    path.write_text("nothing")
    with pytest.raises(DataError, match="holds no emoji"):
        read_emoji(path)


EMOJI = [Emoji(chr(i), f"name{i}", group) for group in ("A", "B") for i in range(100, 130)]


@pytest.mark.parametrize("seed", range(3))
def test_every_split_has_every_group_and_no_emoji_twice(seed: int) -> None:
    splits = split_emoji(EMOJI, seed, None)
    assert {split: len(part) for split, part in splits.items()} == {
        "train": 42,
        "val": 6,
        "test": 12,
    }
    assert all({emoji.group for emoji in part} == {"A", "B"} for part in splits.values())
    assert len({emoji for part in splits.values() for emoji in part}) == len(EMOJI)


def test_digits_are_readable_drawings() -> None:
    drawings = read_digits()
    assert len(drawings) == 1797
    assert min(Counter(map(label, drawings)).values()) > 170
    assert drawings[0].image.size == (128, 128)
    for drawing in drawings[:50]:
        faintest, darkest = drawing.image.getchannel("A").getextrema()
        assert faintest == 0
        assert darkest > 200


def by_split(items: list[Item]) -> dict[str, set[str]]:
    return {
        split: {item.source for item in items if item.split == split}
        for split in ("train", "val", "test")
    }


def assert_disjoint(groups: dict[str, set[str]]) -> None:
    assert all(groups.values())
    for first, second in itertools.combinations(groups.values(), 2):
        assert not first & second


@pytest.mark.parametrize("seed", [0, 1])
def test_digit_tasks_hold_out_drawings_and_pairs(seed: int) -> None:
    for task in DigitTasks(seed, small=True).tasks():
        items = list(task.items())
        assert len(items) == task.expected
        assert_disjoint(by_split(items))
        assert items == list(task.items())


def test_hits_have_exactly_one_instrument(tmp_path: Path) -> None:
    kits = tmp_path / "usr/share/hydrogen/data/drumkits"
    for name in (
        "Kit A/Kick-01.wav",
        "Kit A/Snare_HatLoop.wav",
        "Kit A/notes.txt",
        "Kit A/cowbell.wav",
        "VariBreaks/sub/hh_open.flac",
        "ElectricEmpireKit/BD 2.wav",
    ):
        (kits / name).parent.mkdir(parents=True, exist_ok=True)
        (kits / name).touch()
    found = [(hit.kit, hit.instrument, hit.split) for hit in find_hits([tmp_path])]
    assert found == [
        ("ElectricEmpireKit", "kick", "test"),
        ("Kit A", "kick", "train"),
        ("VariBreaks", "hi-hat", "val"),
    ]


def test_digit_recordings_are_named_by_language(tmp_path: Path) -> None:
    stamps = tmp_path / "usr/share/tuxpaint/stamps/symbols/math"
    stamps.mkdir(parents=True)
    for name in ("3.ogg", "3_en_GB.ogg", "4_nb.ogg", "5_desc_ro.ogg", "6_zh_tw.ogg", "plus.ogg"):
        (stamps / name).touch()
    found = {(each.digit, each.language, each.split) for each in find_stamp_digits(tmp_path)}
    assert found == {
        (3, "en", "train"),
        (4, "no", "val"),
        (5, "ro", "val"),
        (6, "zh", "train"),
    }
    prompts = tmp_path / "usr/share/asterisk/sounds/it_x/digits"
    prompts.mkdir(parents=True)
    for name in ("7.wav", "70.wav", "a.wav"):
        (prompts / name).touch()
    assert [(d.digit, d.split) for d in find_prompt_digits(tmp_path, "it")] == [(7, "test")]


COUNTRIES = [Country(f"Land {i}", f"Town {i}") for i in range(30)]


def test_the_paraphrases_of_val_and_test_are_nowhere_in_training() -> None:
    items = list(capital_task(COUNTRIES).items())
    assert_disjoint(by_split(items))
    twins = twin_task([capital_twin(COUNTRIES)], 0, {"train": 2000, "val": 10})
    trained = {item.question for item in twins.items()}
    trained |= {item.question for item in items if item.split == "train"}
    assert len(trained) > 150
    for wording in (VAL_QUESTION, TEST_QUESTION):
        assert wording not in TWIN_QUESTIONS
        assert not trained & {wording.format(country.name) for country in COUNTRIES}


def test_twins_use_training_emoji_and_pairs_and_hold_back_val_questions() -> None:
    train = EMOJI[:20]
    pairs = list(itertools.combinations(EMOJI[:8], 2))[:20]
    task = twin_task(emoji_twins(train, pairs), 0, {"train": 3000, "val": 12})
    items = list(task.items())
    questions = {
        split: {i.question for i in items if i.split == split} for split in by_split(items)
    }
    assert len(questions["val"]) == 12
    assert not questions["train"] & questions["val"]
    text = " ".join(questions["train"] | questions["val"])
    assert not any(emoji.name in text for emoji in EMOJI[20:30])
    left = [item for item in items if "left?" in item.question]
    assert {frozenset(item.question.split(". ")[0].split(" , ")) for item in left} == {
        frozenset((first.name, second.name)) for first, second in pairs
    }
    assert all(item.question.startswith(item.answer + " ,") for item in left)
    counted = [item for item in items if "How many" in item.question]
    assert all(item.question.count("name") == int(item.answer) for item in counted)
    assert items == list(task.items())


def test_a_corpus_of_few_different_questions_ends() -> None:
    pairs = [(EMOJI[0], EMOJI[1])]
    items = list(twin_task(emoji_twins(EMOJI[:2], pairs), 0, {"train": 500, "val": 900}).items())
    assert Counter(item.split for item in items)["train"] == 500


def test_twins_ask_nothing_in_val_that_train_never_answers() -> None:
    asked = 0
    for seed in range(20):
        items = list(twin_task([capital_twin(COUNTRIES)], seed, {"train": 60, "val": 20}).items())
        answers = {
            split: {i.answer for i in items if i.split == split} for split in by_split(items)
        }
        assert answers["val"] <= answers["train"]
        asked += len(answers["val"])
    assert asked > 20


def test_glosses_are_definitions_without_examples(tmp_path: Path) -> None:
    path = tmp_path / "data.noun"
    path.write_text(
        "  1 a licence text | that is not a definition at all, indeed\n"
        '001 03 n 01 x 0 000 | a definition of some length; "an example"  \n'
        "002 03 n 01 y 0 000 | too short\n"
        "003 03 n 01 z 0 000 | a definition of some length\n"
    )
    assert read_glosses(path) == ["a definition of some length"]


def tar_with(name: str, **fields: object) -> io.BytesIO:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for member, extra in (("good.txt", {}), (name, fields)):
            info = tarfile.TarInfo(member)
            for field, value in extra.items():
                setattr(info, field, value)
            data = b"data" if info.isreg() else b""
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    stream.seek(0)
    return stream


def test_an_archive_cannot_write_outside_its_folder(tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    for bad in (
        tar_with("../evil"),
        tar_with("a/../../evil"),
        tar_with("device", type=tarfile.CHRTYPE),
    ):
        with pytest.raises(DataError, match="is refused"):
            unpack_tar(bad, inside)
    for link in (
        tar_with("link", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
        tar_with("link", type=tarfile.SYMTYPE, linkname="../../etc"),
        tar_with("link", type=tarfile.LNKTYPE, linkname="../../etc/passwd"),
    ):
        unpack_tar(link, inside)
        assert not (inside / "link").is_symlink()
        assert not (inside / "link").exists()
    with pytest.raises(DataError, match="larger than 7 bytes"):
        unpack_tar(tar_with("second"), inside, limit=7)
    with pytest.raises(DataError, match="is refused"):
        unpack_tar(io.BytesIO(b"x" * 2000), inside)
    assert {path.name for path in tmp_path.iterdir()} == {"inside"}


FAKE_APT = """#!/bin/sh
echo "$@" >> "{log}"
case "$*" in
  *" update"*) touch "{lists}"; exit 0;;
  *--simulate*) echo "Inst toylib (1.0)"; echo "Inst toy (1.0)"; exit 0;;
esac
for name; do :; done
if [ "{stale}" = 1 ] && [ ! -e "{lists}" ]; then echo "E: no lists" >&2; exit 100; fi
if [ ! -e "{debs}/$name.deb" ]; then
  echo "E: Failed to fetch https://user:secret@host/x  404 Not Found" >&2; exit 100
fi
cp "{debs}/$name.deb" "${{name}}_1.0_all.deb"
"""


@pytest.fixture
def apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Puts an apt-get on the path that knows the packages toy and toylib; returns its log."""
    if shutil.which("dpkg-deb") is None:
        pytest.skip("needs dpkg-deb")
    debs = tmp_path / "debs"
    for name, file in (("toy", "usr/share/toy/data.txt"), ("toylib", "usr/lib/x/libtoy.so.1")):
        root = tmp_path / name
        (root / file).parent.mkdir(parents=True)
        (root / file).write_text("content")
        (root / "DEBIAN").mkdir()
        control = f"Package: {name}\nVersion: 1.0\nArchitecture: all\nMaintainer: x\n"
        (root / "DEBIAN/control").write_text(control + "Description: x\n")
        script = root / "DEBIAN/postinst"
        script.write_text(f"#!/bin/sh\ntouch {tmp_path}/script-was-run\n")
        script.chmod(0o755)
        debs.mkdir(exist_ok=True)
        command = ["dpkg-deb", "--root-owner-group", "--build", str(root), f"{debs}/{name}.deb"]
        subprocess.run(command, check=True, capture_output=True)
    binaries = tmp_path / "bin"
    binaries.mkdir()
    log = tmp_path / "apt.log"
    log.touch()

    def install(stale: bool) -> Path:
        text = FAKE_APT.format(
            log=log, debs=debs, lists=tmp_path / "lists-are-there", stale=int(stale)
        )
        (binaries / "apt-get").write_text(text)
        (binaries / "apt-get").chmod(0o755)
        return log

    dpkg = shutil.which("dpkg-deb")
    assert dpkg is not None
    (binaries / "dpkg-deb").symlink_to(dpkg)
    monkeypatch.setenv("PATH", f"{binaries}:/usr/bin:/bin")
    return install


def test_a_package_is_fetched_once_and_no_script_is_run(apt, tmp_path: Path) -> None:
    log = apt(stale=False)
    said: list[str] = []
    store = PackageStore(tmp_path / "cache", said.append)
    root = store.get("toy")
    assert said == ["fetching Debian package toy"]
    assert root.name == "toy_1.0"
    assert (root / "usr/share/toy/data.txt").read_text() == "content"
    assert store.versions == {"toy": "1.0"}
    assert PackageStore(tmp_path / "cache").get("toy") == root
    assert len(log.read_text().splitlines()) == 1
    assert not (tmp_path / "script-was-run").exists()
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["toy_1.0"]


def test_stale_lists_are_replaced_by_private_ones(apt, tmp_path: Path) -> None:
    log = apt(stale=True)
    store = PackageStore(tmp_path / "cache")
    store.get("toy")
    first, update, again = log.read_text().splitlines()
    assert "Dir::State::Lists" not in first
    for line in (update, again):
        assert f"Dir::State::Lists={tmp_path}/cache/.apt/lists" in line
    store.get("toylib")
    assert " update" not in log.read_text().splitlines()[-1]


def test_a_program_comes_with_what_it_needs(apt, tmp_path: Path) -> None:
    log = apt(stale=False)
    store = PackageStore(tmp_path / "cache")
    roots = store.programs("toy")
    assert [root.name for root in roots] == ["toy_1.0", "toylib_1.0"]
    assert library_path(roots) == f"{tmp_path}/cache/toylib_1.0/usr/lib/x"
    calls = log.read_text()
    assert PackageStore(tmp_path / "cache").programs("toy") == roots
    assert log.read_text() == calls


def test_what_a_killed_unpacking_leaves_is_not_used(apt, tmp_path: Path) -> None:
    apt(stale=False)
    left = tmp_path / "cache" / ".partial-killed" / "root"
    left.mkdir(parents=True)
    store = PackageStore(tmp_path / "cache")
    assert (store.get("toy") / "usr/share/toy/data.txt").is_file()


def test_a_damaged_archive_leaves_nothing(apt, tmp_path: Path) -> None:
    apt(stale=False)
    archive = tmp_path / "debs/toy.deb"
    archive.write_bytes(archive.read_bytes()[:-100])
    with pytest.raises(PackageError, match="toy cannot be fetched"):
        PackageStore(tmp_path / "cache").get("toy")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_missing_package_is_named_without_addresses(apt, tmp_path: Path) -> None:
    apt(stale=False)
    store = PackageStore(tmp_path / "cache")
    with pytest.raises(PackageError, match="nothing cannot be fetched: Failed to fetch") as caught:
        store.get("nothing")
    assert caught.value.package == "nothing"
    assert "secret" not in str(caught.value)
    assert "host" not in str(caught.value)
    with pytest.raises(PackageError, match="no package name"):
        store.get("../toy")


def test_without_a_mirror_apt_is_asked_once(apt, tmp_path: Path) -> None:
    log = apt(stale=False)
    store = PackageStore(tmp_path / "cache")
    for name in ("nothing", "nowhere"):
        with pytest.raises(PackageError, match=name):
            store.get(name)
    assert len(log.read_text().splitlines()) == 3  # download, update, download; then no more


def test_a_machine_without_apt_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PackageError, match="this machine has no apt-get"):
        PackageStore(tmp_path / "cache").get("toy")
