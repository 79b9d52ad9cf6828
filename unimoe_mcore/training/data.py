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
from unimoe_mcore.config.errors import UserError
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
    check_fits(recipe, manifest, reader, "train")
    plan = GlobalPlan(
        tuple(dataset.share for dataset in reader.catalogue.datasets),
        recipe.data.seed,
        recipe.data.global_samples,
        recipe.data.temperature,
        recipe.data.compose,
    )
    return reader, plan


def held_out_reader(
    recipe: Recipe, manifest: Manifest, tokenizer: TextTokenizer
) -> SampleReader | None:
    """The held-out questions of a run: text for a base, else all that its towers can take.

    None for a base where the split holds no text question.

    Raises:
        UserError: if the split holds no question for another stage.
    """
    split, chosen = recipe.trainer.evaluation.split, recipe.data.evaluation_datasets
    modalities = _modalities(recipe)
    wanted = [
        name
        for name, facts in manifest.datasets.get(split, {}).items()
        if (not chosen or name in chosen) and set(facts.combination.split("+")) <= modalities
    ]
    if not wanted and recipe.stage.kind == "base":
        return None
    if not wanted:
        raise UserError(
            f"{manifest.folder} has no {split} questions for this stage: name some in "
            f"data.evaluation_datasets, or choose another trainer.evaluation.split."
        )
    reader = split_reader(recipe, manifest, tokenizer, split, dict.fromkeys(wanted, 1.0))
    check_fits(recipe, manifest, reader, split)
    return reader


def _modalities(recipe: Recipe) -> set[str]:
    """What a stage can take: text, and the modalities of its towers (a base has none)."""
    towers = () if recipe.stage.kind == "base" else recipe.model.towers
    return {"text", *(modality for name in towers for modality in tower_modalities(name))}


def check_fits(recipe: Recipe, manifest: Manifest, reader: SampleReader, split: str) -> None:
    """Refuse datasets that the stage has no tower for, and samples that are too long.

    Raises:
        UserError: naming the dataset or the sample.
    """
    modalities = _modalities(recipe)
    for number, dataset in enumerate(reader.catalogue.datasets):
        name = dataset.share.name
        foreign = set(manifest.datasets[split][name].combination.split("+")) - modalities
        if foreign:
            raise UserError(
                f"{name} needs {', '.join(sorted(foreign))}, for which this {recipe.stage.kind} "
                f"stage has no tower: take it out of data.datasets."
            )
        for row, entry in enumerate(dataset.entries):
            tokens = reader.catalogue.tokens(number, row, reader.medium_tokens)
            for key, most in (
                ("data.tokens_per_microbatch", recipe.data.tokens_per_microbatch),
                ("model.language.max_tokens", recipe.model.language.max_tokens),
            ):
                if tokens > most:
                    raise UserError(
                        f"{entry.sample.key} of {split}/{name} has {tokens} tokens, more than "
                        f"{key}={most}."
                    )


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
