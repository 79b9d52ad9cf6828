"""``data.sample_tokens``: what is longer is cut behind its last medium, or left out; it is said."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from data_pipeline.conversation.limit import cut_tail
from data_pipeline.conversation.template import Rendered, render
from data_pipeline.conversation.tokenizer import TextTokenizer
from data_pipeline.errors import DataError
from data_pipeline.inspect import main as inspect
from data_pipeline.modalities import MODALITIES
from data_pipeline.planning.catalogue import open_catalogue
from data_pipeline.planning.remarks import Remarkable
from data_pipeline.reading.reader import BrokenSampleError, ReadingJob, SampleReader
from data_pipeline.shards.index import load_manifest
from data_pipeline.shards.integrity import write_manifest
from data_pipeline.shards.schema import MediumRef, Sample, Turn
from data_pipeline.shards.writer import ShardWriter
from tests.data_pipeline.reading_set import RULE
from tests.data_pipeline.sentencepieces import converted, train
from tests.media import picture
from unimoe_mcore.runtime.run_directory import RunDirectory
from unimoe_mcore.training.data import announce_samples


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    path = train(tmp_path_factory.mktemp("sentencepiece"))
    return TextTokenizer(converted(path), "of the test")


def test_no_medium_is_cut_and_something_is_learnt() -> None:
    """Of 300 made-up conversations at every limit: a beginning, or a refusal with its reason."""
    rng, markers = random.Random(0), {1000, 1001}
    for _ in range(300):
        ids, learn, ends = [], [], []
        for _ in range(rng.randint(1, 6)):
            length, kind = rng.randint(1, 5), rng.choice(["given", "medium", "answer"])
            ids += [rng.choice([1000, 1001]) if kind == "medium" else 7] * length
            learn += [kind == "answer"] * length
            if kind == "medium":
                ends.append(len(ids))
        whole = Rendered(ids, learn)
        for most in range(1, len(ids) + 2):
            possible = (not ends or ends[-1] <= most) and any(learn[:most])
            if most >= len(ids):
                assert cut_tail(whole, most, markers) is whole
            elif possible:
                assert cut_tail(whole, most, markers) == Rendered(ids[:most], learn[:most])
            else:
                with pytest.raises(DataError, match=f"data.sample_tokens={most}"):
                    cut_tail(whole, most, markers)


PICTURE = RULE.tokens("image", 0)
SAMPLES = {
    "short": ("<image>\nWhat?", ["a robin"]),
    "long": ("<image>\nWhat?", ["a robin " * 40]),
    "many": ("<image>" * 40 + "What?", ["a robin"]),
    "late": ("a robin " * 40 + "<image>", ["a robin"]),
    "asks": ("<image>" + "a robin " * 40, ["a robin"]),
    "rounds": ("<image>What?", ["a robin", "two cats " * 40]),
    "spells": ("<image>What?", ["</s> ends it"]),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("long") / "set"
    with ShardWriter(folder / "train" / "birds", "birds", "image+text") as writer:
        for key, (question, answers) in SAMPLES.items():
            turns = [turn for a in answers for turn in (Turn("human", "Sure?"), Turn("gpt", a))]
            turns[0] = Turn("human", question)
            members = [f"{number}.png" for number in range(question.count("<image>"))]
            references = tuple(MediumRef("image", member) for member in members)
            data = {member: picture(number).data for number, member in enumerate(members)}
            writer.write(Sample(key, "birds", tuple(turns), references), data)
    write_manifest(folder, "test")
    return folder


def whole(tokenizer: TextTokenizer, key: str) -> Rendered:
    question, answers = SAMPLES[key]
    turns = [
        {"from": who, "value": text}
        for answer in answers
        for who, text in (("human", "Sure?"), ("gpt", answer))
    ]
    turns[0]["value"] = question
    media = {modality: [PICTURE] * question.count(f"<{modality}>") for modality in MODALITIES}
    return render(turns, tokenizer, media)


def test_long_samples_are_cut_or_left_out_and_counted(
    folder: Path, tokenizer: TextTokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    most = len(whole(tokenizer, "short").ids) + 20
    assert most < 40 * PICTURE
    catalogue = open_catalogue(
        load_manifest(folder), "train", ["birds"], tokenizer, RULE, tmp_path, sample_tokens=most
    )
    lengths = {key: len(whole(tokenizer, key).ids) for key in SAMPLES}
    assert catalogue.tokens.tolist() == [min(length, most) for length in lengths.values()]
    assert catalogue.remarkable == (Remarkable(cut=5, overfull=1, otherwise=1),)
    reader = SampleReader(ReadingJob(catalogue.folder, tokenizer.serialised(), RULE, {}, {}))
    left: dict[str, str] = {}
    for row, (key, length) in enumerate(lengths.items()):
        try:
            read = reader.read(row)
        except BrokenSampleError as error:
            left[key] = f"{error.sample.kind}: {error.sample.reason}"
            continue
        expected = whole(tokenizer, key)
        assert read.tokens == Rendered(expected.ids[:most], expected.learn[:most])
        assert len(read.media) == SAMPLES[key][0].count("<image>")
        assert (length > most) == (key in ("long", "rounds"))
    assert left.keys() == {"many", "late", "asks"}
    assert all(reason.startswith("large: ") for reason in left.values())
    assert "up to the end of its last medium" in left["many"]
    assert "up to the end of its last medium" in left["late"]
    assert "its first answer begins behind" in left["asks"]

    directory = RunDirectory(tmp_path / "run", writes=True)
    announce_samples(directory, {"training": catalogue})
    said = capsys.readouterr().out
    assert f"5 of 7 samples are longer than data.sample_tokens={most}" in said
    assert "go to quarantine (1 for their media alone)" in said
    (event,) = map(json.loads, (tmp_path / "run" / "events.jsonl").read_text().splitlines())
    counts = {name: event[name] for name in ("event", "cut", "overfull", "otherwise")}
    assert counts == {"event": "samples", "cut": 5, "overfull": 1, "otherwise": 1}


def test_inspect_says_what_a_recipe_cuts(
    folder: Path, tokenizer: TextTokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer.save(tmp_path / "base" / "tokenizer.json")
    overrides = (
        "data.datasets.birds=1.0",
        "data.missing=skip",
        "data.sample_tokens=150",
        f"stage.base={tmp_path / 'base'}",
        f"paths.cache={tmp_path}",
        f"paths.scratch={tmp_path}",
        f"paths.runs={tmp_path}",
    )
    picture = ["--picture", str(tmp_path / "p.png"), "--json"]
    assert inspect([str(folder), *picture, "--recipe", "stage1", *overrides]) == 0
    found = json.loads(capsys.readouterr().out)
    text = " ".join(found["remarks"])
    assert "samples are longer than data.sample_tokens=150" in text
    assert "1 of 7 samples are learnt whose answers" in text
    assert found["refusals"] == []
