"""An index of many samples with realistic lengths and nothing behind it, for planning."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from data_pipeline.modalities import MODALITIES
from data_pipeline.planning.catalogue import Catalogue
from data_pipeline.planning.cost import CostModel

SHARES = {
    "text": 0.40,
    "image+text": 0.25,
    "speech+text": 0.20,
    "video+text": 0.10,
    "image+speech+text": 0.05,
}
"""Share of each combination in the samples."""

# Forward and backward through Uni-MoE 7B with four experts (8.9 B active parameters, frozen, so
# 2 + 2 operations per parameter and token; 32 layers of attention, 4096 wide, causal), and forward
# through its frozen encoders: CLIP ViT-L/14-336 (0.30 B parameters, 577 places), Whisper small's
# encoder (88 M parameters, 1500 places in 30 s).
UNIMOE_7B = CostModel(
    linear=4 * 8.9e9,
    quadratic=2 * 2 * 32 * 4096 * 2 / 2,
    encoder={
        "image": 2 * 0.30e9 * 577,
        "video": 2 * 0.30e9 * 577,
        "speech": 2 * 88e6 * 1500 / 30,
    },
    source="operations of Uni-MoE 7B, 4 experts",
)


def lengths(combination: str, count: int, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """Tokens of text, tokens of media, and work by modality of samples of a combination.

    Text alone has 20 to 2000 tokens; next to media questions and answers are shorter (20 to 200,
    log-uniform). A picture is 576 tokens, speech 50 per chunk of 30 s and 1 to 20 chunks, a video
    576 from 8 frames.
    """
    if combination == "text":
        text = rng.integers(20, 2001, count)
    else:
        text = np.exp(rng.uniform(np.log(20), np.log(200), count)).astype(np.int64)
    media = np.zeros(count, np.int64)
    work = np.zeros((count, len(MODALITIES)), np.float32)
    for modality in combination.split("+")[:-1]:
        chunks = rng.integers(1, 21, count)
        media += 50 * chunks if modality == "speech" else 576
        units = {"image": np.ones(count), "video": np.full(count, 8), "speech": 30 * chunks}
        work[:, MODALITIES.index(modality)] = units[modality]
    return text, media, work


def write_catalogue(folder: Path, samples: int, seed: int = 0) -> Catalogue:
    """A catalogue of ``samples`` samples, one source per combination."""
    rng = np.random.Generator(np.random.PCG64(seed))
    folder.mkdir(parents=True)
    tokens = np.lib.format.open_memmap(folder / "tokens.npy", "w+", np.int32, (samples,))
    shape = (samples, len(MODALITIES))
    work = np.lib.format.open_memmap(folder / "work.npy", "w+", np.float32, shape)
    start, sources = 0, []
    for combination, share in SHARES.items():
        end = start + round(samples * share)
        for part in range(start, end, 250_000):  # bounded memory, whatever the size
            stop = min(end, part + 250_000)
            text, media, work[part:stop] = lengths(combination, stop - part, rng)
            tokens[part:stop] = text + media
        sources.append([combination.replace("+", "-"), combination, end - start, "synthetic"])
        start = end
    tokens.flush()
    work.flush()
    record = {"sources": sources, "shards": []}
    (folder / "catalogue.json").write_text(json.dumps(record), encoding="utf-8")
    return Catalogue(folder)
