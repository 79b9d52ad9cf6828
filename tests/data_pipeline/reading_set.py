"""A small set of all modalities for tests of reading, whole or with damage, and traps in it."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.conversation.tokenizer import TextTokenizer
from data_pipeline.planning.catalogue import Catalogue, open_catalogue
from data_pipeline.planning.tower_rule import TowerRule
from data_pipeline.reading.reader import ReadingJob
from data_pipeline.reading.sample import BrokenSample, Sample
from data_pipeline.shards import schema
from data_pipeline.shards.columns import IndexTable, map_table
from data_pipeline.shards.index import index_path, load_manifest
from data_pipeline.shards.integrity import write_manifest
from data_pipeline.shards.writer import ShardWriter
from tests.media import clip, picture, sound
from unimoe_mcore.config.towers import ConnectorConfig, EncoderConfig, TowerConfig

EACH = {"pic": 8, "clip": 3, "talk": 8, "hum": 4, "plain": 4}
"""Samples of each dataset; their keys are ``pic-0`` and so on."""
MODALITY = {"pic": "image", "clip": "video", "talk": "speech", "hum": "audio"}
ENDING = {"pic": "png", "clip": "mp4", "talk": "wav", "hum": "ogg"}

_PICTURES = TowerConfig(EncoderConfig(name="random_image", frames=3))
_SOUNDS = TowerConfig(EncoderConfig(name="random_sound", max_seconds=3), ConnectorConfig(stack=2))
RULE = TowerRule({"image": _PICTURES, "speech": _SOUNDS, "audio": _SOUNDS})
ENCODERS = {m: RULE.tower(m).encoder for m in schema.MODALITIES}

Outcome = Sample | BrokenSample


@cache
def medium(dataset: str, number: int) -> bytes:
    """The whole file of a sample."""
    if dataset == "pic":
        return picture(number, (40 + number, 30)).data
    if dataset == "clip":
        return clip(6 + number).data
    if dataset == "talk":
        return sound(4000 + 1777 * number, seed=number).data
    return sound(9000 + 999 * number, 48_000, number, "OGG", "OPUS").data


def write(folder: Path, files: Mapping[str, bytes] | None = None) -> Path:
    """Write the set, one shard a dataset, with these files in place of some samples' own."""
    for dataset, count in EACH.items():
        modality = MODALITY.get(dataset)
        combination = schema.combination_of([modality] if modality else [])
        with ShardWriter(folder / "train" / dataset, dataset, combination) as writer:
            for number in range(count):
                key = f"{dataset}-{number}"
                turns = (schema.Turn("human", "What?"), schema.Turn("gpt", f"It is {key}."))
                media: dict[str, bytes] = {}
                if modality:
                    turns = (schema.Turn("human", f"<{modality}>\nWhat?"), turns[1])
                    whole = medium(dataset, number)
                    media[f"0.{ENDING[dataset]}"] = (files or {}).get(key, whole)
                references = tuple(schema.MediumRef(str(modality), member) for member in media)
                writer.write(schema.Sample(key, dataset, turns, references), media)
    write_manifest(folder, "test")
    return folder


@cache
def tokenizer() -> str:
    """The text of a tokenizer."""
    return TextTokenizer.train(["What? It is pic clip talk hum plain."] * 9, 300).serialised()


def open_set(folder: Path) -> Catalogue:
    """The catalogue of a set."""
    from tokenizers import Tokenizer

    words = TextTokenizer(Tokenizer.from_str(tokenizer()), "of the test")
    return open_catalogue(load_manifest(folder), "train", list(EACH), words, RULE, folder / "cache")


def job(catalogue: Catalogue, **changes: Any) -> ReadingJob:
    """Reads and decodes everything."""
    values = {"rule": RULE, "preparations": ENCODERS, "features": {}, **changes}
    return ReadingJob(catalogue=catalogue.folder, tokenizer=tokenizer(), **values)


def row(key: str) -> int:
    """Catalogue row of a sample."""
    dataset, _, number = key.partition("-")
    before = list(EACH)[: list(EACH).index(dataset)]
    return sum(EACH[name] for name in before) + int(number)


ROWS = sum(EACH.values())


def tasks(size: int = 5) -> dict[int, list[int]]:
    """All rows of the set, in tasks, in an order that mixes the modalities."""
    order = np.random.default_rng(0).permutation(ROWS).tolist()
    return {start // size: order[start : start + size] for start in range(0, ROWS, size)}


def shard(folder: Path, dataset: str) -> Path:
    """The tar of a dataset."""
    return folder / "train" / dataset / f"{dataset}-00000.tar"


def change_index(tar: Path, **columns: Mapping[int, int]) -> None:
    """Give some rows of an index's columns other values."""
    table = map_table(index_path(tar))
    changed = {name: np.array(column) for name, column in table.columns.items()}
    for name, values in columns.items():
        for place, value in values.items():
            changed[name][place] = value
    facts = (table.dataset, table.combination, table.modalities, table.members, table.tar_bytes)
    index_path(tar).write_bytes(IndexTable(*facts, changed).to_bytes())


def same(ours: Outcome, theirs: Outcome) -> bool:
    """Whether two samples are bitwise the same, decoded media included."""
    if ours != theirs or isinstance(ours, BrokenSample) or isinstance(theirs, BrokenSample):
        return ours == theirs
    return all(
        mine.content is yours.content
        or (
            mine.content is not None
            and yours.content is not None
            and mine.content.dtype == yours.content.dtype
            and mine.content.shape == yours.content.shape
            and mine.content.tobytes() == yours.content.tobytes()
        )
        for mine, yours in zip(ours.media, theirs.media, strict=True)
    )


@dataclass(frozen=True)
class TrapRule(TowerRule):
    """Counts as ``RULE`` does, but something happens at speech of some lengths.

    It stands for a decoder that runs wild: what it does, it does in C while a sample is decoded.

    Attributes:
        traps: duration in milliseconds -> ``hang``, ``crash``, ``spin``, ``fail``, ``exit``,
            ``kill`` or ``nap``.
    """

    traps: Mapping[int, str]

    def tokens(self, modality: str, duration_ms: int) -> int:
        """As its class says, unless there is a trap."""
        trap = self.traps.get(duration_ms) if modality == "speech" else None
        if trap == "hang":  # in C, holding the interpreter's lock, deaf to signals
            mutex, library = ctypes.create_string_buffer(128), ctypes.PyDLL(None)
            library.pthread_mutex_lock(mutex)
            library.pthread_mutex_lock(mutex)
        elif trap == "crash":
            ctypes.string_at(0)
        elif trap == "spin":  # where a decoder's error handling swallows what it can
            while True:
                try:
                    sum(range(1000))
                except Exception:
                    continue
        elif trap == "fail":
            raise ZeroDivisionError("a mistake in the rule")
        elif trap == "exit":
            os._exit(7)
        elif trap == "kill":  # as the system does where memory is short
            os.kill(os.getpid(), signal.SIGKILL)
        elif trap == "nap":  # half a second of work, which takes longer where it is suspended
            for _ in range(10):
                time.sleep(0.05)
        return super().tokens(modality, duration_ms)


def trap(**keys: str) -> TrapRule:
    """Traps at samples of ``talk``: ``trap(talk_3="hang")``."""
    lengths = {round((4000 + 1777 * int(key[5:])) / 16): what for key, what in keys.items()}
    return TrapRule(RULE.towers, lengths)
