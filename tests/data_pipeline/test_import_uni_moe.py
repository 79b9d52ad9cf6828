"""Uni-MoE's released JSON: from records to shards to samples, and what is wrong with bad ones."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from webdataset import WebDataset

import data_pipeline
from data_pipeline.conversation.tokenizer import TextTokenizer
from data_pipeline.errors import DataError
from data_pipeline.import_uni_moe import main
from data_pipeline.importers import json_list
from data_pipeline.importers.frames import clip_of
from data_pipeline.importers.json_list import read_list
from data_pipeline.planning.catalogue import open_catalogue
from data_pipeline.planning.tower_rule import TowerRule
from data_pipeline.reading.decode import decode_image, decode_video, probe_video
from data_pipeline.reading.medium import Medium
from data_pipeline.reading.reader import ReadingJob, SampleReader
from data_pipeline.shards.index import load_manifest
from data_pipeline.shards.integrity import verify
from tests.data_pipeline.sentencepieces import converted, train
from tests.data_pipeline.test_vicuna import Original, SentencePieceBackend
from tests.media import clip, picture, sound
from unimoe_mcore.config.towers import ConnectorConfig, EncoderConfig, TowerConfig

FRAMES = 8
_PICTURES = TowerConfig(EncoderConfig(name="random_image", frames=FRAMES))
_SOUNDS = TowerConfig(EncoderConfig(name="random_sound", max_seconds=3), ConnectorConfig(stack=2))
RULE = TowerRule({"image": _PICTURES, "speech": _SOUNDS, "audio": _SOUNDS})
CLUSTER = "/path/to/"


def turns(*texts: str) -> list[dict[str, str]]:
    return [
        {"from": ("human", "gpt")[place % 2], "value": text} for place, text in enumerate(texts)
    ]


FRAME_NAMES = [f"{CLUSTER}frames/{number}.jpg" for number in range(FRAMES)]
RECORDS: list[dict[str, Any]] = [
    {"voice": [f"{CLUSTER}a.wav"], "conversations": turns("<audio>\nGenerate it.", "A dog.")},
    {"voice": f"{CLUSTER}b.wav", "conversations": turns("<audio>\nWho?", "B"), "tokens": 12},
    {
        "voice": [f"{CLUSTER}a.wav"],
        "video": FRAME_NAMES,
        "conversations": turns("<audio>\n<video>\nWhat happens?", "Two cats."),
    },
    {
        "image": f"{CLUSTER}x.png",
        "voice": [f"{CLUSTER}b.wav", f"{CLUSTER}a.wav"],
        "conversations": turns("<image>\n<audio>", "a robin", "<audio>", "12"),
    },
    {"image": "zipped/y.jpg", "conversations": turns("What is <image>?", "trams")},
    {"image": "x.png", "conversations": turns("<image>\nAnd?", "</s> is spelled")},
    {
        "image": ["x.png", "zipped/y.jpg"],
        "video": [FRAME_NAMES[:3], FRAME_NAMES[3:5]],
        "conversations": turns("<video><image>", "1", "<image>then<video>", "2"),
    },
    {"video": f"{CLUSTER}c.mp4", "conversations": turns("<video>", "grey")},
    {"id": "text", "conversations": turns("Just text?", "yes", "Sure?", "yes")},
]


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the records name, in a folder and a zip file beside it."""
    folder = tmp_path_factory.mktemp("media") / "data"
    (folder / "frames").mkdir(parents=True)
    for number in range(FRAMES):
        frame = picture(number, (64, 48), "JPEG").data
        (folder / "frames" / f"{number}.jpg").write_bytes(frame)
    (folder / "x.png").write_bytes(picture(20).data)
    (folder / "a.wav").write_bytes(sound(8000, seed=1).data)
    (folder / "b.wav").write_bytes(sound(20_000, seed=2).data)
    (folder / "c.mp4").write_bytes(clip(10).data)
    (folder / "broken.wav").write_bytes(b"RIFF no sound")
    (folder / "broken.png").write_bytes(b"no picture")
    (folder.parent / "secret.png").write_bytes(picture(9).data)
    (folder / "link.png").symlink_to(folder.parent / "secret.png")
    (folder / "loop.png").symlink_to(folder / "loop.png")
    os.mkfifo(folder / "pipe.png")
    with zipfile.ZipFile(folder.parent / "images.zip", "w") as archive:
        archive.writestr("zipped/y.jpg", picture(21, form="JPEG").data)
        archive.writestr("cut.jpg", picture(22, form="JPEG").data)
    data = (folder.parent / "images.zip").read_bytes()
    spoilt = data.replace(picture(22, form="JPEG").data[-40:], bytes(40))
    (folder.parent / "images.zip").write_bytes(spoilt)
    return folder


def imported(media: Path, place: Path, records: Any, *extra: str) -> int:
    file = place / "Uni_MoE_Speech.json"
    file.write_text(records if isinstance(records, str) else json.dumps(records))
    given = ["--media", str(media), "--map", f"{CLUSTER}={media}/"]
    given += ["--zip", str(media.parent / "images.zip"), "--voice", "speech"]
    return main([str(file), *given, str(place / "set"), *extra])


@pytest.fixture(scope="module")
def built(media: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("released")
    assert imported(media, place, RECORDS) == 0
    return place / "set"


DATASET = "Uni_MoE_Speech"


def test_records_become_samples_with_their_media_and_tokens(
    built: Path, media: Path, tmp_path: Path
) -> None:
    """Through our own reader; tokens are those of the published code's procedure."""
    model = train(tmp_path)
    tokenizer = TextTokenizer(converted(model), "of the test")
    unknown, begin, end = "<unk>", "<s>", "</s>"
    slow = SentencePieceBackend(
        vocab_file=str(model), legacy=True, unk_token=unknown, bos_token=begin, eos_token=end
    )
    original = Original(slow, tokenizer.markers)
    manifest = verify(built)
    catalogue = open_catalogue(manifest, "train", [DATASET], tokenizer, RULE, tmp_path / "cache")
    encoders = {m: RULE.tower(m).encoder for m in ("image", "video", "speech", "audio")}
    job = ReadingJob(catalogue.folder, tokenizer.serialised(), RULE, encoders, {})
    reader, seen = SampleReader(job), 0
    for row in range(len(catalogue)):
        facts = catalogue.entry(row).sample
        sample, number = reader.read(row), int(facts.key.rpartition("-")[2])
        record = RECORDS[number]
        assert facts.key == f"{DATASET}-{number:07d}"
        named = [record.get("image") or [], record.get("voice") or []]
        files = [n for names in named for n in (names if isinstance(names, list) else [names])]
        expected = [bytes_of(media, name) for name in files]
        found = {m.data for m in sample.media if not m.source.endswith("mkv")}
        clips = [m for m in sample.media if m.modality == "video"]
        assert found - {each.data for each in clips} == set(expected)
        videos = record.get("video") or []
        several = [videos] if videos and videos[0] in FRAME_NAMES else videos
        if isinstance(videos, str):
            assert [each.data for each in clips] == [bytes_of(media, videos)]
        else:
            assert len(clips) == len(several)
            for each, names in zip(clips, several, strict=True):
                assert_frames(each, [bytes_of(media, name) for name in names])
        counts = {m: list[int]() for m in ("image", "video", "speech", "audio")}
        for entry in facts.media:
            counts[entry.modality].append(RULE.tokens(entry.modality, entry.duration_ms))
        spoken = json.loads(json.dumps(record["conversations"]).replace("<audio>", "<speech>"))
        if number != 5:  # it spells a structural token: there the two differ
            ids, labels = original.expanded(spoken, counts)
            assert sample.tokens.ids == ids
            assert sample.tokens.learn == [label != -100 for label in labels]
        seen += 1
    assert seen == len(RECORDS)
    assert sum(each.otherwise for each in catalogue.remarkable) == 1


def bytes_of(media: Path, name: str) -> bytes:
    if name.startswith("zipped"):
        return picture(21, form="JPEG").data
    return (media / name.removeprefix(CLUSTER)).read_bytes()


def assert_frames(clip: Medium, frames: list[bytes]) -> None:
    """The clip holds these JPEG files as they are, in this order."""
    places = [clip.data.index(frame) for frame in frames]
    assert places == sorted(places)
    assert probe_video(clip).frames == len(frames)


def test_webdataset_reads_what_was_written(built: Path) -> None:
    manifest = load_manifest(built)
    assert set(manifest.counts["train"][DATASET]) == {
        "text",
        "image+text",
        "video+text",
        "speech+text",
        "image+speech+text",
        "video+speech+text",
        "image+video+text",
    }
    keys = {each["__key__"] for each in data_pipeline.as_webdataset(built, "train")}
    assert keys == {f"{DATASET}-{number:07d}" for number in range(len(RECORDS))}
    shard = next(entry for entry in manifest.entries if entry.combination == "video+speech+text")
    (sample,) = WebDataset([str(built / shard.path)], shardshuffle=False)
    record = json.loads(sample["json"])
    assert record["conversations"][0]["value"] == "<speech>\n<video>\nWhat happens?"
    assert [m["modality"] for m in record["media"]] == ["video", "speech"]


def test_a_second_list_is_added_and_nothing_else_is(
    built: Path, media: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = built.parent
    before = {entry.path for entry in load_manifest(built).entries}
    assert imported(media, place, RECORDS[:1], "--dataset", "clotho", "--voice", "audio") == 0
    manifest = verify(built)
    assert before < {entry.path for entry in manifest.entries}
    assert set(manifest.counts["train"]["clotho"]) == {"audio+text"}
    assert any("1 records taken, 0 left out" in note for note in manifest.notes)
    assert imported(media, place, RECORDS[:1], "--dataset", "clotho") == 1
    assert "clotho exists: choose another --dataset" in capsys.readouterr().err
    assert verify(built) == manifest


@pytest.mark.parametrize("form", ["JPEG", "PNG", "sizes", "turned"])
def test_frames_keep_their_number_order_and_pixels(form: str) -> None:
    sizes = [(64, 48)] * 6 + [(33, 70)] * 2 * (form == "sizes")
    frames = [picture(n, s, "PNG" if form == "PNG" else "JPEG") for n, s in enumerate(sizes)]
    if form == "JPEG":  # whole colour planes: how coarser ones are enlarged is a decoder's own
        frames = [Medium("image", saved(frame.data, subsampling=0), "x") for frame in frames]
    if form == "turned":  # the third picture's camera was held upside down
        frames[2] = Medium("image", turned(frames[2].data), "x")
    video = Medium("video", clip_of(frames), "x")
    assert video.data == clip_of(frames)  # so that shards can be compared byte by byte
    found = decode_video(video, len(frames)).astype(int)
    expected = [decode_image(frame).astype(int) for frame in frames]
    assert probe_video(video).frames == len(frames)
    for one, other in zip(found, expected, strict=True):
        if one.shape != other.shape:
            assert one.shape == expected[0].shape  # as the decoder of videos has it
        elif form == "JPEG":
            # Two decoders: each rounds the cosine transform and the change of colours.
            assert np.abs(one - other).max() <= 4
        else:
            assert (one == other).all()


def turned(data: bytes) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 3
    return saved(data, exif=exif)


def saved(data: bytes, **options: Any) -> bytes:
    """A picture as a JPEG file with other options."""
    file = io.BytesIO()
    Image.open(io.BytesIO(data)).save(file, "JPEG", **options)
    return file.getvalue()


GOOD = RECORDS[0]
BAD: dict[str, tuple[Any, str]] = {
    "number": (7, "it is a number, a record has fields"),
    "no turns": ({}, "conversations is missing, a list of turns was expected"),
    "turn": ({"conversations": ["a"]}, "conversations[0] is text, a turn has fields"),
    "value": (
        {"conversations": [*turns("a", "b"), {"from": "human", "value": 3}]},
        "conversations[2].value is a number, text was expected",
    ),
    "from": (
        {"conversations": [{"from": "system", "value": "a"}, *turns("b")]},
        "conversations: turn 0 is from 'system' but 'human' was expected",
    ),
    "empty": ({"conversations": turns("a", "")}, "conversations: turn 1 is an empty answer"),
    "odd": ({"conversations": turns("a")}, "1 turns; a conversation has pairs"),
    "image": ({**GOOD, "image": {"a": 1}}, "image is an object, a path or a list was expected"),
    "video": ({**GOOD, "video": [["a"], "b"]}, "video is a list of other things, a path or a list"),
    "too few": (
        {"conversations": turns("<image>", "b")},
        "1 <image> placeholders but 0 image media",
    ),
    "too many": (
        {**GOOD, "voice": ["a.wav", "b.wav"]},
        "1 <speech> placeholders but 2 speech media",
    ),
    "speech": (
        {**GOOD, "conversations": turns("<speech>", "b")},
        "conversations[0] has <speech>; <audio> stands for it",
    ),
    "answer": (
        {"image": "x.png", "conversations": turns("a", "<image>")},
        "turn 1 has the placeholder <image> in an answer",
    ),
    "missing": (
        {**GOOD, "voice": ["a.wav", f"{CLUSTER}no.wav"]},
        "voice[1]: MEDIA/no.wav does not exist",
    ),
    "frame": (
        {"video": [*FRAME_NAMES[:2], "no.jpg"], "conversations": turns("<video>", "b")},
        "video frame 2: no.jpg does not exist",
    ),
    "frames": (
        {"video": ["x.png", "broken.png"], "conversations": turns("<video>", "b")},
        "video: broken.png: cannot decode this picture",
    ),
    "broken sound": ({**GOOD, "voice": "broken.wav"}, "voice: broken.wav: "),
    "broken picture": (
        {"image": "broken.png", "conversations": turns("<image>", "b")},
        "image: broken.png: cannot decode this picture",
    ),
    "above": ({**GOOD, "voice": "../secret.png"}, "secret.png lies outside the folders of media"),
    "absolute": ({**GOOD, "voice": "/etc/passwd"}, "/etc/passwd lies outside the folders of media"),
    "mapped": ({**GOOD, "voice": f"{CLUSTER}../secret.png"}, "lies outside the folders of media"),
    "link": ({**GOOD, "voice": "link.png"}, "link.png lies outside the folders of media"),
    "loop": ({**GOOD, "voice": "loop.png"}, "loop.png"),
    "pipe": ({**GOOD, "voice": "pipe.png"}, "pipe.png is no ordinary file"),
    "folder": ({**GOOD, "voice": "frames"}, "frames"),
    "nul": ({**GOOD, "voice": "a\0.wav"}, "voice: is no name of a file"),
    "long": ({**GOOD, "voice": "a" * 5000}, "voice: "),
    "zip": (
        {"image": "cut.jpg", "conversations": turns("<image>", "b")},
        "image: cut.jpg in MEDIA.zip cannot be read (Bad CRC-32",
    ),
    "huge": (
        {"conversations": turns("a", "b" * 1_100_000)},
        "conversations: 1100",
    ),
}


def test_bad_records_are_named_and_left_out(
    media: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All in one list between good ones: each costs one line that names its number and field."""
    records = [GOOD]
    for bad, _ in BAD.values():
        records += [bad, GOOD]
    assert imported(media, tmp_path, records) == 0
    lines = [s for s in capsys.readouterr().out.splitlines() if s.startswith("left out: ")]
    for number, (name, (_, reason)) in enumerate(BAD.items()):
        line = lines[number].replace(str(media), "MEDIA").replace(f"{media.parent}/images", "MEDIA")
        assert line.startswith(f"left out: {DATASET}.json record {2 * number + 1}: "), name
        assert reason in line, name
        assert len(line) < 600
    assert len(lines) == len(BAD)
    manifest = verify(tmp_path / "set")
    assert manifest.datasets["train"][DATASET].samples == len(BAD) + 1
    assert all(note in line for note, line in zip(manifest.notes[1:], lines, strict=True))
    assert manifest.notes[0].startswith(f"{DATASET}.json: {len(BAD) + 1} records taken, {len(BAD)}")


def test_too_many_bad_records_stop_it_and_leave_nothing(
    media: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = {**GOOD, "voice": "gone.wav"}
    assert imported(media, tmp_path, [GOOD, bad, bad, 3, GOOD], "--leave-out", "2") == 1
    error = capsys.readouterr().err
    assert "more than 2 records cannot be used (missing: 2, record: 1), the last: record 3" in error
    assert not [path for path in (tmp_path / "set").rglob("*") if path.is_file()]
    assert imported(media, tmp_path, [bad], "--leave-out", "2") == 1
    assert "has no record that can be used (missing: 1)" in capsys.readouterr().err


LISTS: dict[str, tuple[str | bytes, str]] = {
    "object": ('{"a": []}', "is no JSON list of records"),
    "nothing": ("", "is no JSON behind record 0"),
    "cut": ('[{"conversations": []}, {"conv', "is no JSON behind record 1 (parse error"),
    "behind": ("[1] 2", "is no JSON behind record 1"),
    "deep": ("[" * 100_000, "record 0 is nested more than 16 deep"),
    "bytes": (b'["\xff"]', "is no JSON behind record 0 (lexical error: invalid bytes in UTF8"),
    "digits": ("[1, " + "9" * 100_000 + "]", "is no JSON behind record 1"),
    "large": ('[1, "' + "a" * 3 * 2**20 + '"]', "record 1 has more than 1048576 bytes"),
}


@pytest.mark.parametrize("name", LISTS)
def test_a_file_that_is_no_list_of_records_is_refused(
    name: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text, reason = LISTS[name]
    monkeypatch.setattr(json_list, "MOST_BYTES", 2**20)
    file = tmp_path / "list.json"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert main([str(file), str(tmp_path / "set"), "--voice", "audio"]) == 1
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "set").exists()


def test_a_list_of_records_is_what_json_says(tmp_path: Path) -> None:
    values = [*RECORDS, 1, -2.5, "é\u2028\U0001f642", None, True, [], {}, [[{"a": [1]}]]]
    file = tmp_path / "list.json"
    for indent in (None, 2):
        file.write_text(json.dumps(values, indent=indent))
        assert list(read_list(file)) == values
    with pytest.raises(DataError, match="cannot be read"):
        list(read_list(tmp_path / "none.json"))


def test_a_long_list_needs_no_more_memory_than_a_short_one(tmp_path: Path) -> None:
    """60 MB of records, read by a process that may have 40 MB more than it begins with."""
    file = tmp_path / "list.json"
    record = json.dumps({"conversations": turns("a" * 3000, "b" * 3000)})
    file.write_text("[" + ",\n".join([record] * 10_000) + "]")
    code = (
        "import resource, sys, pathlib\n"
        "from data_pipeline.importers.json_list import read_list\n"
        "size = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (size + 40_000_000,) * 2)\n"
        "print(sum(1 for _ in read_list(pathlib.Path(sys.argv[1]))))\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, str(file)], capture_output=True, text=True, check=True
    )
    assert found.stdout == "10000\n"
