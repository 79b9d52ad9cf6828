"""``python -m unimoe_mcore.calibrate RECIPE [overrides]``: measure what samples cost here.

Times the recipe's language model (forward and backward, random weights) on sequences of several
lengths, and every frozen encoder on pictures or sound, in one process on this machine. The
coefficients go to a file; ``data.costs=FILE`` then deals by them. Takes some seconds for a small
model; on a cluster run it on one node of the kind that trains.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from unimoe_mcore.runtime.devices import prepare_device

prepare_device()

import numpy as np  # noqa: E402
import torch  # noqa: E402
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402

from data_pipeline.conversation.template import Rendered  # noqa: E402
from data_pipeline.modalities import MODALITIES, modality, tower_modalities  # noqa: E402
from data_pipeline.planning.cost import CostModel  # noqa: E402
from data_pipeline.reading.collate import MicroBatch, collate  # noqa: E402
from data_pipeline.reading.medium import Medium  # noqa: E402
from data_pipeline.reading.sample import Sample  # noqa: E402
from unimoe_mcore.compose import speak  # noqa: E402
from unimoe_mcore.config.composition import compose_recipe  # noqa: E402
from unimoe_mcore.config.parallel import ParallelConfig  # noqa: E402
from unimoe_mcore.config.recipe import Recipe  # noqa: E402
from unimoe_mcore.config.towers import EncoderConfig  # noqa: E402
from unimoe_mcore.model.build import build_model  # noqa: E402
from unimoe_mcore.model.parts import train_only  # noqa: E402
from unimoe_mcore.model.towers.encoders import build_encoder  # noqa: E402
from unimoe_mcore.runtime import groups  # noqa: E402
from unimoe_mcore.runtime.capabilities import detect, transformer_flags  # noqa: E402
from unimoe_mcore.runtime.devices import device  # noqa: E402
from unimoe_mcore.runtime.precision import DTYPES, choose_precision  # noqa: E402
from unimoe_mcore.runtime.run_directory import machine  # noqa: E402

ROUNDS = 5
TOKENS = 2048
"""Tokens of the rows that are timed."""
_WORK = 16
"""Pictures, frames or seconds of sound that an encoder is timed with, about."""


def calibrate(recipe: Recipe) -> CostModel:
    """Measure a recipe's costs, in seconds."""
    recipe.parallel = ParallelConfig(processes=1)
    collection = groups.initialise(recipe.parallel)
    try:
        linear, quadratic = _language(recipe, collection)
        encoder = {
            each: _encoder(tower.encoder, each)
            for name, tower in recipe.model.towers.items()
            for each in tower_modalities(name)
        }
    finally:
        groups.destroy()
    return CostModel(linear, quadratic, encoder, f"seconds measured on {machine()['cpu']}")


def _language(recipe: Recipe, collection: ProcessGroupCollection) -> tuple[float, float]:
    """Seconds per token and per token squared, by least squares over rows of several lengths."""
    dtype = DTYPES[choose_precision(recipe.trainer.precision).value]
    flags = transformer_flags(detect())
    markers = {m: number for number, m in enumerate(MODALITIES)}
    model = build_model(recipe, collection, markers, dtype, flags)
    for parameter in model.parameters():  # a model comes without values
        torch.nn.init.normal_(parameter, std=recipe.model.language.init_std)
    train_only(model, recipe.stage)
    most = min(TOKENS, recipe.model.language.max_tokens)
    lengths = sorted({max(8, most // parts) for parts in (1, 2, 4, 16)})
    rows, seconds = [], []
    for length in lengths:
        count = most // length
        batch = _row(length, count, recipe.model.language.vocabulary)

        def step(row: MicroBatch = batch) -> None:
            losses = model(row)
            (losses * row.loss_mask).sum().backward()

        rows.append([count * length, count * length**2])
        seconds.append(_median(step))
    linear, quadratic = np.linalg.lstsq(np.array(rows, float), np.array(seconds), rcond=None)[0]
    if quadratic < 0 or linear <= 0:  # too short for attention to show
        linear, quadratic = sum(seconds) / sum(row[0] for row in rows), 0.0
    return float(linear), float(quadratic)


def _row(length: int, count: int, vocabulary: int) -> MicroBatch:
    """``count`` sequences of ``length`` tokens, half of each with labels."""
    rng = np.random.Generator(np.random.PCG64(0))
    samples = []
    for number in range(count):
        ids = rng.integers(len(MODALITIES), vocabulary, length).tolist()
        learn = [place >= length // 2 for place in range(length)]
        samples.append(Sample(str(number), "calibration", "text", Rendered(ids, learn)))
    return collate(samples, 0, 1).to(device())


def _encoder(config: EncoderConfig, name: str) -> float:
    """Seconds per unit of a modality's work: a picture, a frame, a second of sound."""
    encoder = build_encoder(config)
    rng = np.random.Generator(np.random.PCG64(0))
    content, duration_ms = modality(name).made(config, rng)
    work = modality(name).work(config, duration_ms)
    media = [Medium(name, b"", "calibration", content)] * max(1, round(_WORK / work))
    return _median(lambda: encoder.encode(media)) / (len(media) * work)


def _median(work: Callable[[], object]) -> float:
    """Median seconds of some calls; the first is not counted."""
    taken = []
    for _ in range(ROUNDS + 1):
        began = time.perf_counter()
        work()
        torch.cuda.synchronize()
        taken.append(time.perf_counter() - began)
    return float(np.median(taken[1:]))


def main(arguments: Sequence[str]) -> int:
    """Compose, measure, write, say how to use it."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if arguments else 2
    recipe = compose_recipe(arguments[0], arguments[1:])
    costs = calibrate(recipe)
    path = Path(recipe.paths.cache) / "costs" / f"{recipe.name}.json"
    costs.save(path)
    token = costs.linear
    print(
        f"one token {1e6 * token:.1f} us; a sequence of 1000 tokens takes "
        f"{1 + 1000 * costs.quadratic / token:.2f} times its tokens; in tokens: "
        + ", ".join(f"{m} {c / token:.1f}" for m, c in costs.encoder.items())
    )
    print(f"written: deal by it with data.costs={path}")
    return 0


if __name__ == "__main__":
    sys.exit(speak(main))
