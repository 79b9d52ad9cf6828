"""One step of stage 3 on mixed samples: by our engine, and the official one written anew.

``python -m benchmarks.mixed_step`` is a child of ``benchmarks.training_step``.
"""

from __future__ import annotations

from unimoe_mcore.runtime.devices import prepare_device

prepare_device()

from dataclasses import fields  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402

from benchmarks.children import serve  # noqa: E402
from benchmarks.language_step import timed  # noqa: E402
from benchmarks.official_step import Habits, Hearing, OfficialModel  # noqa: E402
from data_pipeline.conversation.template import Rendered  # noqa: E402
from data_pipeline.planning.tower_rule import medium_tokens  # noqa: E402
from data_pipeline.reading.collate import collate  # noqa: E402
from data_pipeline.reading.medium import Medium  # noqa: E402
from data_pipeline.reading.prepare import SAMPLES_PER_FEATURE  # noqa: E402
from data_pipeline.reading.sample import Sample  # noqa: E402
from unimoe_mcore.checkpoints.sources import Sources  # noqa: E402
from unimoe_mcore.config.composition import compose_recipe  # noqa: E402
from unimoe_mcore.config.recipe import Recipe  # noqa: E402
from unimoe_mcore.config.towers import TowerConfig, sound_features  # noqa: E402
from unimoe_mcore.model.initialise import initial_value  # noqa: E402
from unimoe_mcore.model.towers.encoders import build_encoder  # noqa: E402
from unimoe_mcore.model.towers.feature_cache import FeatureCache  # noqa: E402
from unimoe_mcore.model.towers.tower import Tower  # noqa: E402
from unimoe_mcore.runtime import groups  # noqa: E402
from unimoe_mcore.runtime.capabilities import detect, transformer_flags  # noqa: E402
from unimoe_mcore.training.module import TrainModule  # noqa: E402
from unimoe_mcore.training.step import train_step  # noqa: E402

MARKERS = {"image": 4, "video": 5, "speech": 6, "audio": 7}
FEW = 4
"""Samples of an official micro-batch (its speech script: 4, added up over 2)."""
SECONDS = {"speech": (2.0, 5.0), "audio": (1.0, 4.0)}
QUESTION, ANSWER, TEXT = (8, 25), (3, 20), (40, 120)
"""Fewest and most tokens of a question and an answer about a medium, and of a text alone."""


def recipe_for(cache: str) -> Recipe:
    """Stage 3 of the tiny model in one process."""
    return compose_recipe(
        "stage3",
        [
            "parallel.processes=1",
            "parallel.expert=1",
            "trainer.precision=fp32",
            # The official side has one rate: a schedule would set the sides apart.
            "trainer.warmup=0",
            "trainer.min_lr=1.0",
            f"paths.cache={cache}",
        ],
    )


def samples_of(recipe: Recipe, count: int) -> list[Sample]:
    """Pictures, speech, sounds and text in turn, decoded as a reader would have them."""
    rng = np.random.default_rng(0)
    return [
        _sample(recipe, f"{number}", ("image", "speech", "audio", "text")[number % 4], rng)
        for number in range(count)
    ]


def _sample(recipe: Recipe, key: str, group: str, rng: np.random.Generator) -> Sample:
    vocabulary = recipe.model.language.vocabulary

    def words(least: int, most: int) -> list[int]:
        return [int(n) for n in rng.integers(16, vocabulary, rng.integers(least, most))]

    media: tuple[Medium, ...] = ()
    ids = words(*(TEXT if group == "text" else QUESTION))
    if group != "text":
        tower = recipe.model.towers[group]
        duration = int(1000 * rng.uniform(*SECONDS.get(group, (0, 0))))
        ids = [MARKERS[group]] * medium_tokens(tower, group, duration) + ids
        media = (Medium(group, f"{group} {key}".encode(), key, _content(tower, group, duration)),)
    answer = words(*ANSWER)
    learn = [False] * len(ids) + [True] * len(answer)
    return Sample(key, "mixed", group, Rendered(ids + answer, learn), media)


def _content(tower: TowerConfig, group: str, duration: int) -> np.ndarray:
    """Noise as the encoder is fed it: no encoder looks at what it computes."""
    rng = np.random.default_rng(duration)
    if group == "image":
        side = tower.encoder.resolution
        return rng.integers(0, 256, (side, side, 3), np.uint8)
    length = sound_features(duration, tower.encoder) * SAMPLES_PER_FEATURE
    return (0.1 * rng.standard_normal(length)).astype(np.float32)


class Ours:
    """The engine as a run has it; one packed row."""

    def __init__(self, cache: str, samples: int) -> None:
        self.recipe = recipe_for(cache)
        collection = groups.initialise(self.recipe.parallel)
        flags = transformer_flags(detect())
        self.module = TrainModule(self.recipe, collection, MARKERS, flags, Sources(), "fp32")
        chosen = samples_of(self.recipe, samples)
        self.batch = collate(chosen, 0, self.recipe.data.pad_to)

    def prepare(self, cold: bool = False) -> None:
        """Before the clock starts: forget all features."""
        if cold:
            for tower in self.module.towers():
                assert tower.features.folder is not None
                for path in tower.features.folder.glob("*/*.npy"):
                    path.unlink()

    def step(self) -> dict[str, float]:
        """Features are read from the cache, or encoded and written to it."""
        result = train_step(self.module, [self.batch], 0)
        total = result.sums.sum(0)
        loss, tokens = (total[0] / total[1]).item(), float(result.tokens)
        return {"loss": loss, "norm": result.grad_norm, "tokens": tokens}


class Official:
    """The official step; what is switched on is told at each step."""

    def __init__(self, cache: str, samples: int) -> None:
        recipe = self.recipe = recipe_for(cache)
        towers = {}
        for name, config in recipe.model.towers.items():
            folder = Path(recipe.paths.cache) / "features"
            features = FeatureCache(folder, build_encoder(config.encoder))
            towers[name] = Tower(name, config, features, recipe.model.language.hidden, None)
            _fill(towers[name], recipe)
        self.model = OfficialModel(recipe, towers, MARKERS)
        chosen = samples_of(recipe, samples)
        heard = [m for sample in chosen for m in sample.media if m.modality != "image"]
        self.hearing = Hearing(towers["speech"].features.encoder, heard)
        self.whole = [collate(chosen, 0, 1)]
        self.few = [collate(chosen[i : i + FEW], 0, 1) for i in range(0, samples, FEW)]
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(_groups(self.trained, recipe), fused=True)

    def prepare(self, **_: bool) -> None:
        """Nothing: the cache stays as it is."""

    def step(self, **on: bool) -> dict[str, float]:
        """The mean over all label tokens, also where micro-batches are added up."""
        habits, trainer = Habits(**on), self.recipe.trainer
        batches = self.few if habits.few else self.whole
        tokens, loss = sum(batch.label_tokens for batch in batches), 0.0
        self.optimizer.zero_grad()
        for batch in batches:
            part = self.model(batch, self.hearing, habits) / tokens
            part.backward()
            loss += part.item()
        norm = nn.utils.clip_grad_norm_(self.trained, trainer.clip, error_if_nonfinite=True)
        self.optimizer.step()
        return {"loss": loss, "norm": norm.item()}


@torch.no_grad()
def _fill(tower: Tower, recipe: Recipe) -> None:
    """The connector's weights as our engine initialises them where no stage came before."""
    for name, weight in tower.named_parameters():
        key = f"connector.{tower.name}.{name.replace('input_projections.0.', '')}"
        shape, seed = tuple(weight.shape), recipe.trainer.seed
        weight.copy_(initial_value(key, shape, seed, recipe.model.language))


def _groups(parameters: list[nn.Parameter], recipe: Recipe) -> list[dict[str, Any]]:
    trainer = recipe.trainer
    common = {"lr": trainer.lr, "betas": tuple(trainer.betas), "eps": trainer.eps}
    matrices = [p for p in parameters if p.dim() > 1]
    vectors = [p for p in parameters if p.dim() <= 1]
    return [
        {"params": matrices, "weight_decay": trainer.weight_decay, **common},
        {"params": vectors, "weight_decay": 0.0, **common},
    ]


SIDES = {"ours": Ours, "official": Official}
ALL = {field.name: True for field in fields(Habits)}
"""Every habit of the official step."""


def main() -> None:
    sides: list[Any] = []

    def build(side: str, cache: str, samples: int) -> dict[str, Any]:
        sides[:] = [SIDES[side](cache, samples)]
        return {}

    def step(prepare: dict[str, bool] | None = None, **options: bool) -> dict[str, float]:
        sides[0].prepare(**(prepare or {}))
        return timed(sides[0].step, **options)

    serve({"build": build, "step": step})
    groups.destroy()


if __name__ == "__main__":
    main()
