"""A run that only reads: ``python -m tests.data_pipeline.cases_loading FOLDER RANKS WORKERS DEAL``.

Reads the steps of the tiny world's plan for all ranks, one after another, and writes after each
step what was read and then, atomically, the state: as a training run does. Takes up the state
that it finds. Meant to be killed.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from data_pipeline.conversation.tokenizer import TextTokenizer
from data_pipeline.planning.catalogue import Catalogue, open_catalogue
from data_pipeline.planning.cost import CostModel
from data_pipeline.planning.dealer import Dealer
from data_pipeline.planning.dealing import Ranks
from data_pipeline.planning.permutation import Shuffle
from data_pipeline.planning.plan import Mixture
from data_pipeline.planning.timeline import PlanState, Timeline
from data_pipeline.planning.tower_rule import TowerRule
from data_pipeline.reading.loader import ReadStep, StepLoader
from data_pipeline.reading.pool import ReaderPool
from data_pipeline.reading.quarantine import Quarantine
from data_pipeline.reading.reader import ReadingJob
from data_pipeline.shards.index import load_manifest
from tests.workspace import DATASETS, overrides
from unimoe_mcore.config.composition import compose_recipe

STEPS = 14
CAPACITY = 96


def tokenizer_of(folder: Path) -> TextTokenizer:
    """A tokenizer for the tiny world, made once."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        texts = ["red red. Which colour? blue green low middle high voice pitch first then"] * 50
        path.write_text(TextTokenizer.train(texts, 300).serialised(), encoding="utf-8")
    return TextTokenizer.load(path)


def catalogue_of(folder: Path, split: str = "train") -> Catalogue:
    """The tiny world's samples."""
    manifest = load_manifest(folder / "data" / "tiny")
    tokenizer = tokenizer_of(folder)
    return open_catalogue(manifest, split, DATASETS, tokenizer, rule(folder), folder / "cache")


def rule(folder: Path) -> TowerRule:
    """The media rule of the tiny world's towers."""
    return TowerRule(compose_recipe("stage1", overrides(folder)).model.towers)


def job(folder: Path, catalogue: Catalogue, note: Path | None = None) -> ReadingJob:
    """Reads and decodes everything."""
    media = rule(folder)
    encoders = {m: media.tower(m).encoder for m in ("image", "video", "speech", "audio")}
    return ReadingJob(
        catalogue=catalogue.folder,
        tokenizer=tokenizer_of(folder).serialised(),
        rule=media,
        preparations=encoders,
        features={},
        in_progress=note,
    )


def mixture(compose: str = "mixed", samples: int = 12) -> Mixture:
    """Every dataset of the tiny world."""
    weights = {name: 1.0 + number / 4 for number, name in enumerate(DATASETS)}
    return Mixture(weights, samples, compose=compose, seed=3, shuffle=Shuffle(4, 3))


def loaders(
    folder: Path,
    stack: ExitStack,
    ranks: int,
    workers: int,
    compose: str = "mixed",
    deal: str = "balanced",
    state: PlanState | None = None,
    quarantine: Path | None = None,
) -> tuple[list[StepLoader], Timeline]:
    """The loaders of all ranks."""
    catalogue = catalogue_of(folder)
    timeline = Timeline(catalogue.sources, {0: mixture(compose)}, state)
    dealer = Dealer(catalogue, timeline, CostModel(), Ranks(ranks, 1, CAPACITY), deal)
    known = Quarantine(quarantine or folder / "quarantine.jsonl")
    found = []
    for rank in range(ranks):
        pool = stack.enter_context(ReaderPool(job(folder, catalogue), workers, 30.0))
        found.append(StepLoader(dealer, pool, known, rank, STEPS, 2 if workers else 0))
    return found, timeline


def keys(steps: list[ReadStep]) -> list[str]:
    """Dataset and key of all samples of a step, sorted."""
    return sorted(
        f"{sample.dataset}/{sample.key}"
        for step in steps
        for samples in step.microbatches
        for sample in samples
    )


def planned(folder: Path, compose: str = "mixed") -> Iterator[list[str]]:
    """What the plan says about every step."""
    catalogue = catalogue_of(folder)
    timeline = Timeline(catalogue.sources, {0: mixture(compose)})
    for step in range(STEPS):
        entries = [catalogue.entry(int(r)) for r in catalogue.rows(timeline.step(step))]
        yield sorted(f"{shard.dataset}/{sample.key}" for shard, sample in entries)


def main(folder: Path, ranks: int, workers: int, deal: str) -> None:
    """Read on from the saved state."""
    saved, log = folder / "state.json", folder / "read"
    log.mkdir(exist_ok=True)
    state = PlanState.from_json(json.loads(saved.read_text())) if saved.is_file() else None
    with ExitStack() as stack:
        found, timeline = loaders(folder, stack, ranks, workers, deal=deal, state=state)
        for step in range(state.step if state else 0, STEPS):
            read = [loader.read(step) for loader in found]
            time.sleep(0.05)  # the step itself
            (log / f"{step}-{os.getpid()}.json").write_text(json.dumps(keys(read)))
            partial = saved.with_suffix(".partial")
            partial.write_text(json.dumps(timeline.state(step + 1).to_json()))
            partial.replace(saved)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
