"""Small samples of every modality, and tars as other programs write them."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from data_pipeline.importers.pictures import jpeg, mp4
from data_pipeline.importers.recording import wav
from data_pipeline.shards.schema import PLACEHOLDERS, MediumRef, Sample, Turn
from data_pipeline.shards.writer import ShardWriter

PICTURE = jpeg(Image.new("RGB", (32, 24), (200, 30, 30))).data
SOUND = wav("speech", np.zeros(13_000, dtype=np.int16), 10_000).data
CLIP = mp4([Image.new("RGB", (32, 32), (10 * i, 0, 0)) for i in range(8)]).data
FILES = {"image": ("jpg", PICTURE), "video": ("mp4", CLIP), "speech": ("wav", SOUND)}
ALL = ("image", "video", "speech", "image")

Members = list[tuple[str, bytes]]


def make(key: str, modalities: tuple[str, ...] = (), dataset: str = "d") -> tuple[Sample, dict]:
    """A sample with these media, and the media's bytes by member name."""
    media, files, text = [], {}, ""
    for number, modality in enumerate(modalities):
        extension, data = FILES[modality]
        member = f"{number}.{extension}"
        media.append(MediumRef(modality, member))
        files[member] = data
        text += PLACEHOLDERS[modality] + "\n"
    turns = (Turn("human", text + "What?"), Turn("gpt", f"Ünicode {key}"))
    return Sample(key, dataset, turns, tuple(media)), files


def write(folder: Path, samples: list[tuple[Sample, dict]], **limits: int) -> list[Path]:
    """Write samples of one combination with our writer."""
    first = samples[0][0]
    with ShardWriter(folder, first.dataset, first.combination, **limits) as writer:
        for sample, files in samples:
            writer.write(sample, files)
    return [shard.path for shard in writer.shards]


def members_of(key: str, modalities: tuple[str, ...] = ("image",)) -> Members:
    """A sample's members; the record comes first, where our writer puts it last."""
    sample, files = make(key, modalities)
    media = [(f"{key}.{member}", data) for member, data in files.items()]
    return [(f"{key}.json", sample.to_json()), *media]


def foreign(
    path: Path, members: Iterable[tuple[str, bytes]], mode: str = "w", form: int | None = None
) -> Path:
    """Write a tar with Python's own module."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode, format=form) as tar:  # type: ignore[call-overload]
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            if name.endswith("/"):
                info.type = tarfile.DIRTYPE
            tar.addfile(info, io.BytesIO(data))
    return path
