"""A tiny world for tests: real shards of every modality, random encoders, a model of 0.1 M.

``python -m tests.workspace FOLDER`` builds one and trains its base and stage 1.
"""

from __future__ import annotations

import random
import shutil
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from data_pipeline.importers.item import MediaFile
from data_pipeline.importers.pictures import jpeg, mp4
from data_pipeline.importers.recording import wav
from data_pipeline.shards.integrity import write_manifest
from data_pipeline.shards.schema import ASSISTANT, HUMAN, MediumRef, Sample, Turn, combination_of
from data_pipeline.shards.writer import ShardWriter

COLOURS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200)}
PITCHES = {"low": 200, "middle": 600, "high": 2000}


def picture(colour: str, rng: random.Random) -> MediaFile:
    """A square of one colour with some noise, 32 x 32 pixels."""
    noise = np.random.Generator(np.random.PCG64(rng.getrandbits(32)))
    pixels = np.array(COLOURS[colour]) + noise.integers(-20, 20, (32, 32, 3))
    return jpeg(Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).convert("RGBA"))


def tone(modality: str, pitch: str, rng: random.Random) -> MediaFile:
    """A sine of a quarter to three quarters of a second at 16 kHz."""
    time = np.arange(rng.randint(4000, 12000)) / 16000
    wave = 8000 * np.sin(2 * np.pi * PITCHES[pitch] * time + rng.random())
    return wav(modality, wave.astype(np.int16), 16000)


def clip(colour: str, rng: random.Random) -> MediaFile:
    """Eight frames of one colour that grows darker."""
    base = np.full((32, 32, 3), COLOURS[colour], dtype=np.float64)
    frames = [base * (1 - 0.1 * t) + rng.randint(0, 10) for t in range(8)]
    return mp4([Image.fromarray(f.clip(0, 255).astype(np.uint8)) for f in frames])


def questions(dataset: str, split: str) -> list[tuple[str, str, list[MediaFile]]]:
    """Question, answer and media of a dataset's split; the same on every call."""
    rng = random.Random(f"{dataset} {split}")
    number = {"train": 24, "val": 6, "test": 9}[split]
    rows: list[tuple[str, str, list[MediaFile]]] = []
    for index in range(number):
        colour, pitch = list(COLOURS)[index % 3], list(PITCHES)[index % 3]
        rows.append(
            {
                "img_group": lambda c=colour: ("<image>\nWhich colour?", c, [picture(c, rng)]),
                "img_left": lambda c=colour: (
                    "<image> then <image>: which colour is first?",
                    c,
                    [picture(c, rng), picture(rng.choice(list(COLOURS)), rng)],
                ),
                "vid_dir": lambda c=colour: ("<video>\nWhich colour?", c, [clip(c, rng)]),
                "spk_digit": lambda p=pitch: (
                    "<speech>\nWhich voice?",
                    p,
                    [tone("speech", p, rng)],
                ),
                "aud_drum": lambda p=pitch: ("<audio>\nWhich pitch?", p, [tone("audio", p, rng)]),
                "twins": lambda c=colour: (f"{c} {c}. Which colour?", c, []),
            }[dataset]()
        )
    return rows


DATASETS = ("img_group", "img_left", "vid_dir", "spk_digit", "aud_drum", "twins")
"""Named like the quickstart's, so that its recipes fit."""


def build_data(folder: Path) -> Path:
    """Shards, indexes and manifest of every dataset."""
    for split in ("train", "val", "test"):
        for dataset in DATASETS:
            rows = questions(dataset, split)
            combination = combination_of(m.modality for m in rows[0][2])
            with ShardWriter(folder / split / dataset, dataset, combination, 10) as writer:
                for index, (question, answer, media) in enumerate(rows):
                    names = [f"{k}.{m.extension}" for k, m in enumerate(media)]
                    refs = [MediumRef(m.modality, n) for m, n in zip(media, names, strict=True)]
                    turns = (Turn(HUMAN, question), Turn(ASSISTANT, answer))
                    sample = Sample(f"{dataset}-{index:04d}", dataset, turns, tuple(refs))
                    writer.write(sample, {n: m.data for m, n in zip(media, names, strict=True)})
    write_manifest(folder, "tests/1")
    return folder


def branch(world: Path, folder: Path, *runs: str) -> Path:
    """Another world with the same data and cache, and copies of what some runs gave."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("data", "cache"):
        (folder / name).symlink_to(world / name)
    for run in runs:
        shutil.copytree(world / "runs" / run / "gives", folder / "runs" / run / "gives")
    return folder


def overrides(folder: Path) -> list[str]:
    """Hydra overrides that turn any recipe into one for this world."""
    sound = "{name: random_sound, max_seconds: 1.0, silence_seconds: 0.0, feature_size: 12}"
    return [
        f"paths.runs={folder}/runs",
        f"paths.data={folder}/data",
        f"paths.cache={folder}/cache",
        f"data.folder={folder}/data/tiny",
        "data.missing=skip",
        "data.evaluation_datasets=[]",
        "data.global_samples=12",
        "data.pad_to=32",
        "data.tokens_per_microbatch=256",
        "model.language.hidden=32",
        "model.language.ffn=48",
        "model.language.heads=4",
        "model.language.kv_heads=2",
        "model.language.vocabulary=300",
        "model.language.blocks=2",
        "model.towers.image.encoder={name: random_image, resolution: 32, frames: 4}",
        "model.towers.image.connector.max_tokens=8",
        f"model.towers.speech.encoder={sound}",
        "model.towers.speech.connector={name: mlp2x_gelu, stack: 8, max_tokens: 6}",
        f"model.towers.audio.encoder={sound}",
        "model.towers.audio.connector={name: learned_query, queries: 3, heads: 2, stack: 1}",
        "trainer.steps=4",
        "trainer.warmup=1",
        "trainer.checkpoint_every=2",
        "trainer.precision=fp32",
        "trainer.log_every=1",
    ]


def train(folder: Path, recipe: str, *extra: str) -> int:
    """Run one stage with two processes; returns its exit code."""
    from unimoe_mcore.config.composition import compose_recipe
    from unimoe_mcore.launch import launch

    return launch(compose_recipe(recipe, [*overrides(folder), *extra]))


def build(folder: Path) -> Path:
    """Data, a trained base and stage 1: what a stage 2 needs."""
    build_data(folder / "data" / "tiny")
    for recipe in ("base", "stage1"):
        if train(folder, recipe):
            raise RuntimeError(f"{recipe} failed")
    return folder


if __name__ == "__main__":
    build(Path(sys.argv[1]))
