"""Sets of 4,000 samples with real media for comparing readers, and how their media are read.

A shard holds a random mixture of all combinations, so that readers that go shard by shard, and
workers that share shards out, have as even work as ours.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import soundfile
from PIL import Image
from webdataset import TarWriter

from benchmarks.decoders import RATE, photo, voice
from data_pipeline.build import index_folder
from data_pipeline.conversation.tokenizer import TextTokenizer
from data_pipeline.planning.tower_rule import TowerRule
from data_pipeline.shards.schema import PLACEHOLDERS, MediumRef, Sample, Turn
from unimoe_mcore.config.towers import ConnectorConfig, EncoderConfig, TowerConfig

SAMPLES = 4000
SHARDS = 16
DATASET = "mixture"
TOKENIZER = "tokenizer.json"

_PICTURES = TowerConfig(EncoderConfig(resolution=224, frames=8))
_SOUNDS = TowerConfig(EncoderConfig(name="whisper"), ConnectorConfig(stack=8, max_tokens=200))
RULE = TowerRule({"image": _PICTURES, "speech": _SOUNDS})
ENCODERS = {m: RULE.tower(m).encoder for m in ("image", "video", "speech")}
"""Pictures become squares of 224 pixels, clips eight of them, speech at most 30 s at 16 kHz."""


@dataclass(frozen=True)
class Kind:
    """What a set is made of.

    Attributes:
        shares: combination -> share of the samples.
        sides: shortest and longest side of a picture, pixels.
        seconds: shortest and longest recording.
        formats: file types of recordings, in turn.
        words: fewest and most words of an answer.
        about: what it is, for the table.
    """

    shares: dict[str, float]
    sides: tuple[int, int]
    seconds: tuple[float, float]
    formats: tuple[str, ...]
    words: tuple[int, int]
    about: str


KINDS = {
    "small": Kind(
        {"text": 0.1, "image+text": 0.5, "speech+text": 0.4},
        (64, 336),
        (1.3, 1.3),
        ("WAV",),
        (3, 20),
        "small media: JPEG of 64 to 336 pixels (50%), WAV of 1.3 s (40%), text (10%)",
    ),
    "large": Kind(
        {
            "text": 0.40,
            "image+text": 0.25,
            "speech+text": 0.20,
            "video+text": 0.10,
            "image+speech+text": 0.05,
        },
        (480, 640),
        (5, 30),
        ("WAV", "FLAC"),
        (20, 200),
        "large media: text (40%), JPEG of 480 to 640 pixels (25%), WAV and FLAC of 5 to 30 s "
        "(20%), clips of 2 to 4 s, 320 x 240 (10%), picture and speech (5%)",
    ),
}


class _Media:
    """Makes a set's files, each another piece of a photograph, a clip or a recording."""

    def __init__(self, kind: Kind, rng: np.random.Generator) -> None:
        self._kind = kind
        self._rng = rng
        self._photo = photo(1200, 800)
        self._voice = voice(RATE, 1)[:, 0]
        self._clips: list[bytes] = []

    def make(self, modality: str) -> tuple[str, bytes]:
        """The ending of a file's name, and its bytes."""
        if modality == "image":
            return "jpg", self._jpeg()
        if modality == "video":
            # Clips take long to compress: forty are used several times.
            if len(self._clips) < 40:
                self._clips.append(self._clip())
            return "mp4", self._clips[int(self._rng.integers(len(self._clips)))]
        form = str(self._rng.choice(self._kind.formats))
        return form.lower(), self._sound(form)

    def _crop(self, width: int, height: int) -> np.ndarray:
        top = int(self._rng.integers(len(self._photo) - height + 1))
        left = int(self._rng.integers(self._photo.shape[1] - width + 1))
        return self._photo[top : top + height, left : left + width]

    def _jpeg(self) -> bytes:
        width, height = (int(n) for n in self._rng.integers(*self._kind.sides, 2, endpoint=True))
        file = io.BytesIO()
        Image.fromarray(self._crop(width, height)).save(file, "JPEG", quality=90)
        return file.getvalue()

    def _sound(self, form: str) -> bytes:
        length = int(self._rng.uniform(*self._kind.seconds) * RATE)
        start = int(self._rng.integers(len(self._voice) - length + 1))
        file = io.BytesIO()
        soundfile.write(file, self._voice[start : start + length], RATE, format=form)
        return file.getvalue()

    def _clip(self) -> bytes:
        still, file = self._crop(320, 240), io.BytesIO()
        with av.open(file, "w", format="mp4") as container:
            stream = container.add_stream("libx264", rate=15)
            assert isinstance(stream, av.VideoStream)
            stream.width, stream.height, stream.pix_fmt = 320, 240, "yuv420p"
            for step in range(int(15 * self._rng.uniform(2, 4))):
                frame = np.ascontiguousarray(np.roll(still, -3 * step, axis=1))
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode())
        return file.getvalue()


def _samples(kind: Kind, count: int) -> Iterator[tuple[Sample, dict[str, bytes]]]:
    rng = np.random.default_rng(0)
    media = _Media(kind, rng)
    words = [f"{a}{b}" for a in ("ba", "ko", "mi", "tu", "re") for b in ("lan", "sor", "den", "k")]
    names = [name for name, share in kind.shares.items() for _ in range(round(count * share))]
    for number, place in enumerate(rng.permutation(len(names))):
        files: dict[str, bytes] = {}
        references: list[MediumRef] = []
        question = ""
        for modality in names[place].split("+")[:-1]:
            ending, data = media.make(modality)
            member = f"{len(files)}.{ending}"
            files[member] = data
            references.append(MediumRef(modality, member))
            question += PLACEHOLDERS[modality] + "\n"
        answer = " ".join(rng.choice(words, int(rng.integers(*kind.words))))
        turns = (Turn("human", question + "What is this about?"), Turn("gpt", answer))
        yield Sample(f"s{number:05}", DATASET, turns, tuple(references)), files


def write_set(folder: Path, kind: Kind, count: int = SAMPLES) -> Path:
    """Write a set of about ``count`` samples, with its tokenizer beside the shards."""
    place = folder / "train" / DATASET
    place.mkdir(parents=True)
    texts = []
    shards = [TarWriter(str(place / f"{n:02}.tar"), encoder=False) for n in range(SHARDS)]
    for number, (sample, files) in enumerate(_samples(kind, count)):
        members = {"__key__": sample.key, **files, "json": sample.to_json()}
        shards[number * SHARDS // count].write(members)
        texts += [turn.text for turn in sample.turns]
    for shard in shards:
        shard.close()
    index_folder(folder, say=lambda text: None)
    TextTokenizer.train(texts, 1000).save(folder / TOKENIZER)
    return folder
