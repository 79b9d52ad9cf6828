"""What a run reads: catalogue, plan, tokenizer, and how media become tokens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from data_pipeline.conversation.tokenizer import TextTokenizer
from data_pipeline.planning.catalogue import MediumTokens, open_catalogue
from data_pipeline.planning.plan import GlobalPlan
from data_pipeline.reading.loader import Packing, SampleReader
from data_pipeline.reading.records import RecordReader
from data_pipeline.shards.index import Manifest
from unimoe_mcore.config.recipe import Recipe
from unimoe_mcore.config.towers import medium_tokens, tower_modalities


def token_counter(recipe: Recipe) -> MediumTokens:
    """Language-model tokens of a medium, by the tower that takes its modality."""
    by_modality = {
        modality: tower
        for name, tower in recipe.model.towers.items()
        for modality in tower_modalities(name)
    }

    def count(modality: str, duration_ms: int) -> int:
        return medium_tokens(by_modality[modality], modality, duration_ms)

    return count


def train_tokenizer(manifest: Manifest, vocabulary: int) -> TextTokenizer:
    """BPE on all text of the training split, questions and answers."""
    return TextTokenizer.train(_texts(manifest), vocabulary)


def _texts(manifest: Manifest) -> Iterator[str]:
    reader = RecordReader()
    for shard in manifest.shards("train"):
        for sample in shard.samples:
            for turn in reader.record(shard, sample)["conversations"]:
                yield turn["value"]


def training_reader(
    recipe: Recipe, manifest: Manifest, tokenizer: TextTokenizer
) -> tuple[SampleReader, GlobalPlan]:
    """The reader and the plan of a run's training data."""
    datasets = dict(recipe.data.datasets)
    if recipe.data.missing == "skip":
        have = manifest.datasets.get("train", {})
        datasets = {name: factor for name, factor in datasets.items() if name in have}
    reader = split_reader(recipe, manifest, tokenizer, "train", datasets)
    plan = GlobalPlan(
        tuple(dataset.share for dataset in reader.catalogue.datasets),
        recipe.data.seed,
        recipe.data.global_samples,
        recipe.data.temperature,
        recipe.data.compose,
    )
    return reader, plan


def split_reader(
    recipe: Recipe,
    manifest: Manifest,
    tokenizer: TextTokenizer,
    split: str,
    datasets: dict[str, float],
) -> SampleReader:
    """A reader over some datasets of a split."""
    catalogue = open_catalogue(manifest, split, datasets, tokenizer, Path(recipe.paths.cache))
    packing = Packing(recipe.data.tokens_per_microbatch, recipe.data.pad_to)
    return SampleReader(catalogue, tokenizer, token_counter(recipe), packing)
