"""What a run reads: the data set, its samples, the plan, and how they are decoded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from data_pipeline.conversation.tokenizer import TextTokenizer
from data_pipeline.modalities import tower_modalities
from data_pipeline.opening import open_checked
from data_pipeline.planning.catalogue import Catalogue, open_catalogue
from data_pipeline.planning.permutation import Shuffle
from data_pipeline.planning.plan import Mixture
from data_pipeline.planning.remarks import remarks
from data_pipeline.planning.tower_rule import TowerRule
from data_pipeline.reading.reader import ReadingJob
from data_pipeline.reading.records import RecordReader
from data_pipeline.reading.remote import ShardStore
from data_pipeline.reading.transfer import is_address
from data_pipeline.shards.index import Manifest
from data_pipeline.shards.schema import MIXED
from unimoe_mcore.config.data import DataConfig
from unimoe_mcore.config.errors import UserError
from unimoe_mcore.config.recipe import Recipe
from unimoe_mcore.config.towers import EncoderConfig
from unimoe_mcore.runtime.run_directory import RunDirectory
from unimoe_mcore.training.agreement import decided_by_first_rank


def open_data(recipe: Recipe) -> Manifest:
    """The recipe's data set, checked: a folder's shards now, remote ones as they are fetched.

    Raises:
        UserError, DataError: it is not there, or damaged.
    """
    place, cache = recipe.data.folder, Path(recipe.paths.cache)
    if is_address(place):  # every machine needs a mirror of its own
        return open_checked(place, cache)
    return decided_by_first_rank(lambda: open_checked(place, cache))


def shard_store(recipe: Recipe) -> ShardStore:
    """Where copies of remote shards are kept on this machine."""
    return ShardStore(Path(recipe.paths.scratch), recipe.data.cache_bytes)


def train_tokenizer(recipe: Recipe, manifest: Manifest) -> TextTokenizer:
    """BPE on all text of the training split, questions and answers."""
    texts = _texts(manifest, RecordReader(shard_store(recipe)))
    return TextTokenizer.train(texts, recipe.model.language.vocabulary)


def _texts(manifest: Manifest, reader: RecordReader) -> Iterator[str]:
    for shard in manifest.shards("train"):
        for sample in shard.samples:
            for turn in reader.record(shard, sample)["conversations"]:
                yield turn["value"]


def phases(recipe: Recipe, manifest: Manifest) -> dict[int, Mixture]:
    """First step -> mixture: the recipe's own, and one for every declared change."""
    data = recipe.data
    found = {0: _mixture(data)}
    for change in data.changes:
        given = {k: v for k, v in vars(change).items() if k != "step" and v is not None}
        data = replace(data, **given)
        found[change.step] = _mixture(data)
    if recipe.data.missing == "skip":
        have = manifest.datasets.get("train", {})
        for step, mixture in found.items():
            kept = {name: n for name, n in mixture.datasets.items() if name in have}
            found[step] = replace(mixture, datasets=kept)
    return found


def _mixture(data: DataConfig) -> Mixture:
    return Mixture(
        datasets=dict(data.datasets),
        global_samples=data.global_samples,
        temperature=data.temperature,
        combinations=dict(data.combinations),
        compose=data.compose,
        seed=data.seed,
        shuffle=Shuffle(data.shuffle.block, data.shuffle.window),
    )


def training_catalogue(recipe: Recipe, manifest: Manifest, tokenizer: TextTokenizer) -> Catalogue:
    """All samples that a run may draw, whatever its plan changes to.

    Raises:
        UserError, DataError: a dataset is not there, or does not fit the run.
    """
    mixtures = phases(recipe, manifest).values()
    names = list(dict.fromkeys(name for mixture in mixtures for name in mixture.datasets))
    catalogue = split_catalogue(recipe, manifest, tokenizer, "train", names)
    if recipe.data.deal == "sharded" or any(m.compose == "uniform" for m in mixtures):
        mixed = [s.dataset for s in catalogue.sources if s.combination == MIXED]
        if mixed:
            raise UserError(
                f"{', '.join(mixed)}: shards with several combinations can only be drawn with "
                f"data.compose=mixed and data.deal=balanced: rewrite them with "
                f"python -m data_pipeline.build index {manifest.folder} --rewrite."
            )
    return catalogue


def held_out_catalogue(
    recipe: Recipe, manifest: Manifest, tokenizer: TextTokenizer, split: str, purpose: str
) -> Catalogue | None:
    """The held-out questions of a split: text for a base, else all that the run's towers can take.

    None for a base where the split holds no text question.

    Args:
        purpose: ``evaluation`` or ``validation``: whose ``trainer.<purpose>.split`` it is.

    Raises:
        UserError: if the split holds no question for another stage.
    """
    chosen = recipe.data.evaluation_datasets
    modalities = _modalities(recipe)
    wanted = [
        name
        for name in manifest.datasets.get(split, {})
        if (not chosen or name in chosen) and _asked(manifest, split, name) <= modalities
    ]
    if not wanted and recipe.stage.kind == "base":
        return None
    if not wanted:
        raise UserError(
            f"{manifest.folder} has no {split} questions for this stage: name some in "
            f"data.evaluation_datasets, or choose another trainer.{purpose}.split"
            f"{' (or trainer.validation.every=0)' if purpose == 'validation' else ''}."
        )
    return split_catalogue(recipe, manifest, tokenizer, split, wanted)


def split_catalogue(
    recipe: Recipe, manifest: Manifest, tokenizer: TextTokenizer, split: str, names: Sequence[str]
) -> Catalogue:
    """The samples of some datasets of a split.

    Raises:
        UserError: naming a dataset that the stage has no tower for, or a sample that is too long.
    """
    modalities, have = _modalities(recipe), manifest.datasets.get(split, {})
    for name in names:
        foreign = _asked(manifest, split, name) - modalities if name in have else set()
        if foreign:
            raise UserError(
                f"{name} needs {', '.join(sorted(foreign))}, for which this {recipe.stage.kind} "
                f"stage has no tower: take it out of data.datasets."
            )
    catalogue = open_catalogue(
        manifest,
        split,
        names,
        tokenizer,
        TowerRule(recipe.model.towers),
        Path(recipe.paths.cache),
        RecordReader(shard_store(recipe)),
        recipe.data.sample_tokens,
    )
    _check_fits(recipe, catalogue, split)
    return catalogue


def _modalities(recipe: Recipe) -> set[str]:
    """What a stage can take: text, and the modalities of its towers (a base has none)."""
    towers = () if recipe.stage.kind == "base" else recipe.model.towers
    return {"text", *(modality for name in towers for modality in tower_modalities(name))}


def _asked(manifest: Manifest, split: str, dataset: str) -> set[str]:
    """The modalities of a dataset, of all its combinations."""
    return {
        modality
        for shard in manifest.shards(split, dataset)
        for modality in ("text", *shard.modalities)
    }


def _check_fits(recipe: Recipe, catalogue: Catalogue, split: str) -> None:
    """Refuse a sample that is longer than a micro-batch or than the model takes.

    Raises:
        UserError: naming the longest.
    """
    longest = int(np.argmax(catalogue.tokens))
    tokens = int(catalogue.tokens[longest])
    for key, most in (
        ("data.tokens_per_microbatch", recipe.data.tokens_per_microbatch),
        ("model.language.max_tokens", recipe.model.language.max_tokens),
    ):
        if tokens > most:
            shard, sample = catalogue.entry(longest)
            raise UserError(
                f"{sample.key} of {split}/{shard.dataset} has {tokens} tokens, more than "
                f"{key}={most}: leave it out, raise that, or cut such samples with "
                f"data.sample_tokens={most}."
            )


def reading_job(
    recipe: Recipe,
    catalogue: Catalogue,
    tokenizer: TextTokenizer,
    features: dict[str, Path | None],
    note: Path | None = None,
) -> ReadingJob:
    """All that is needed to read a catalogue's samples.

    Args:
        features: folders of cached features by modality, of the towers that this rank has, None
            where features are not cached; media of others are not decoded.
        note: file in which this process notes the sample that it decodes.
    """
    rule = TowerRule(recipe.model.towers)
    encoders: dict[str, EncoderConfig] = {m: rule.tower(m).encoder for m in features}
    return ReadingJob(
        catalogue=catalogue.folder,
        tokenizer=tokenizer.serialised(),
        rule=rule,
        preparations=encoders,
        features={m: folder for m, folder in features.items() if folder is not None},
        store=shard_store(recipe),
        in_progress=note,
    )


def announce_samples(directory: RunDirectory, catalogues: Mapping[str, Catalogue]) -> None:
    """Say and record which samples are cut, left out, or learnt otherwise than by the original.

    Args:
        directory: of the run.
        catalogues: by what they are for, such as ``training``.
    """
    for purpose, catalogue in catalogues.items():
        for remark in remarks(catalogue.sources, catalogue.remarkable, catalogue.sample_tokens):
            if directory.writes:
                print(f"{directory.path.name}: {purpose}: {remark}", flush=True)
        for source, numbers in zip(catalogue.sources, catalogue.remarkable, strict=True):
            if any(numbers):
                directory.event(
                    "samples",
                    purpose=purpose,
                    dataset=source.dataset,
                    combination=source.combination,
                    samples=source.count,
                    **numbers._asdict(),
                )
