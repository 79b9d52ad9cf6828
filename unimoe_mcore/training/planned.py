"""What a run will draw, known before it starts."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate, count, islice, takewhile
from pathlib import Path

from data_pipeline.conversation.tokenizer import TextTokenizer
from data_pipeline.planning.timeline import Timeline
from data_pipeline.shards.index import Manifest
from unimoe_mcore.checkpoints.artefact import TOKENIZER
from unimoe_mcore.config.recipe import Recipe
from unimoe_mcore.training.data import phases, training_catalogue


def tokens_by_step(recipe: Recipe, manifest: Manifest) -> Iterator[int]:
    """Tokens of every step that a run on a base could take, media included, without end.

    Lengths alone are looked at; nothing is decoded.

    Raises:
        UserError, DataError: a dataset is not there, or the base has no tokenizer.
    """
    tokenizer = TextTokenizer.load(Path(recipe.stage.base) / TOKENIZER)
    catalogue = training_catalogue(recipe, manifest, tokenizer)
    timeline = Timeline(catalogue.sources, phases(recipe, manifest))
    for step in count():
        yield int(catalogue.tokens[catalogue.rows(timeline.step(step))].sum())


def planned_tokens(recipe: Recipe, manifest: Manifest) -> int:
    """Tokens of all steps of a run."""
    return sum(islice(tokens_by_step(recipe, manifest), recipe.trainer.steps))


def steps_for(recipe: Recipe, manifest: Manifest, tokens: int) -> int:
    """Fewest steps in which a run sees at least so many tokens."""
    seen = accumulate(tokens_by_step(recipe, manifest))
    return 1 + sum(1 for _ in takewhile(lambda total: total < tokens, seen))
