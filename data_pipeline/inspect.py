"""What a data set holds, and what a recipe makes of it: ``python -m data_pipeline.inspect PLACE``.

Without a recipe: samples, media, sizes and lengths by split, dataset and combination, and a
picture of the lengths. With ``--recipe NAME [overrides]``: the mixture in samples and in
language-model tokens, epochs, what the encoders compute, micro-batches and padding. Indexes are
counted whole, of texts some thousand are read.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_pipeline.conversation.tokenizer import TextTokenizer
from data_pipeline.errors import DataError
from data_pipeline.inspection.contents import read_contents
from data_pipeline.inspection.figure import Panel, draw
from data_pipeline.inspection.outlook import look_ahead, mixtures
from data_pipeline.inspection.panels import length_panels, token_panels
from data_pipeline.inspection.samples import glance, sources_of
from data_pipeline.inspection.tables import contents_parts, outlook_parts, show
from data_pipeline.inspection.texts import CHARACTERS_PER_TOKEN
from data_pipeline.modalities import tower_modalities
from data_pipeline.planning.cost import CostModel
from data_pipeline.planning.remarks import remarks
from data_pipeline.planning.tower_rule import TowerRule
from data_pipeline.reading.records import RecordReader
from data_pipeline.reading.remote import ShardStore, open_set
from data_pipeline.reading.transfer import shown
from data_pipeline.shards.index import Manifest
from unimoe_mcore.config.composition import compose_recipe
from unimoe_mcore.config.errors import UserError
from unimoe_mcore.config.recipe import Recipe

_CACHE = Path("cache")  # for the indexes of a set that is elsewhere; as webdatasets.py has it
_TOKENIZER = "tokenizer.json"


def inspect_contents(
    place: str, splits: Sequence[str], datasets: Sequence[str], picture: Path | None, as_json: bool
) -> None:
    """Show what a data set holds.

    Args:
        place: folder or address of the set.
        splits: only these; empty for all.
        datasets: only these; empty for all.
        picture: where the histograms go; None: into the current folder.
        as_json: print one JSON object instead of tables.

    Raises:
        DataError: there is no such set, split or dataset, or it is damaged.
    """
    manifest = open_set(place, _CACHE)
    target = _target(manifest, picture, "lengths")
    contents = read_contents(manifest, splits, datasets)
    read = sum(group.texts_read for group in contents.groups)
    every = sum(group.samples for group in contents.groups)
    caption = (
        f"Of {read:,} of {every:,} texts and all media. In a panel every split adds up to 100 %; "
        "the blue line is the median of the first."
    )
    title = f"{_name(manifest)}: lengths by combination"
    drawn = _draw(target, length_panels(contents), title, caption)
    if as_json:
        _print(manifest, {**contents.to_json(), "picture": drawn})
        return
    last = f"picture: {drawn}" if drawn else "no picture: there are no lengths to show"
    show([*contents_parts(manifest, contents), last])


def inspect_recipe(
    place: str, name: str, overrides: Sequence[str], picture: Path | None, as_json: bool
) -> None:
    """Show what a recipe makes of a data set.

    Args:
        place: folder or address of the set, whatever ``data.folder`` of the recipe says.
        name: of the recipe.
        overrides: Hydra overrides.
        picture: where the histograms go; None: into the current folder.
        as_json: print one JSON object instead of tables.

    Raises:
        UserError: the recipe is wrong.
        DataError: there is no such set, it lacks something, or is damaged.
    """
    recipe = compose_recipe(name, overrides)
    manifest = open_set(place, Path(recipe.paths.cache))
    target = _target(manifest, picture, "tokens")
    planned = mixtures(recipe.data, list(manifest.datasets.get("train", {})))
    names = list(dict.fromkeys(name for mixture in planned.values() for name in mixture.datasets))
    towers = {} if recipe.stage.kind == "base" else recipe.model.towers
    taken = {modality for tower in towers for modality in tower_modalities(tower)}
    sources = sources_of(manifest, names, taken)
    tokenizer, counted = _tokenizer(recipe)
    costs, dealt = _costs(recipe)
    most_each = recipe.data.sample_tokens
    store = ShardStore(Path(recipe.paths.scratch), recipe.data.cache_bytes)
    with tempfile.TemporaryDirectory() as folder:
        seen = glance(
            sources,
            tokenizer,
            TowerRule(towers),
            RecordReader(store),
            Path(folder),
            most_each,
        )
        outlook = look_ahead(recipe, seen.catalogue, planned, costs)
        first, most = outlook.phases[0], recipe.data.tokens_per_microbatch
        drawn = _draw(
            target,
            token_panels(seen.catalogue, first),
            f"{_name(manifest)}: tokens of what {recipe.name} draws",
            f"Weighted as drawn in steps 1 to {first.end:,}. A micro-batch holds at most {most:,}.",
        )
        read = f"{seen.texts_read:,} of {len(seen.catalogue):,} texts were read"
        told = list(remarks(seen.catalogue.sources, seen.catalogue.remarkable, most_each))
    said = [f"{counted}; {read}.", *told, dealt]
    if as_json:
        found = {"recipe": recipe.name, **outlook.to_json(), "remarks": said}
        _print(manifest, {**found, "picture": drawn})
        return
    show([*outlook_parts(outlook, said), f"picture: {drawn}"])


def _tokenizer(recipe: Recipe) -> tuple[TextTokenizer | None, str]:
    """The tokenizer that a run takes, if it is there, and what tokens are counted by."""
    run = Path(recipe.paths.runs) / recipe.name
    folders = [Path(recipe.stage.base)] if recipe.stage.base else [run / "gives", run]
    for path in (folder / _TOKENIZER for folder in folders):
        if path.is_file():
            return TextTokenizer.load(path), f"Text tokens: counted with {path}"
    return None, (
        f"Text tokens: estimated, since there is no {folders[0] / _TOKENIZER} yet, as one per "
        f"{CHARACTERS_PER_TOKEN} characters of a turn, rounded up, one per turn and one per sample"
    )


def _costs(recipe: Recipe) -> tuple[CostModel, str]:
    """What is dealt by here, and the sentence that says so."""
    if recipe.data.costs != "estimate":
        return CostModel.load(Path(recipe.data.costs)), f"Dealt by {recipe.data.costs}."
    return CostModel(), "Dealt by tokens alone; a run also weighs attention and encoders."


def _target(manifest: Manifest, picture: Path | None, what: str) -> Path:
    """Where the picture goes.

    Raises:
        DataError: that is inside the data set, or no PNG.
    """
    path = picture or Path(f"{_name(manifest)}-{what}.png")
    if path.suffix != ".png":
        raise DataError(f"{path} is no name of a picture: --picture wants a name that ends in .png")
    if path.resolve().is_relative_to(manifest.folder.resolve()):
        raise DataError(
            f"{path} would lie inside the data set, which stays as it is: name another place with "
            "--picture"
        )
    return path


def _name(manifest: Manifest) -> str:
    """Short name of a set."""
    last = (manifest.url or str(manifest.folder.resolve())).rstrip("/").rpartition("/")[2]
    return "".join(each if each.isalnum() or each in "._-" else "-" for each in last) or "set"


def _draw(target: Path, panels: Sequence[Panel], title: str, caption: str) -> str | None:
    """Draw if there is anything to draw; returns where."""
    if not panels:
        return None
    try:
        draw(panels, title, caption, target)
    except OSError as error:
        raise DataError(
            f"{target} cannot be written ({error.strerror}); name another place with --picture"
        ) from error
    return str(target)


def _print(manifest: Manifest, found: dict[str, Any]) -> None:
    facts = {
        "place": shown(manifest.url) or str(manifest.folder),
        "builder": manifest.builder,
        "seed": manifest.seed,
        "options": manifest.options,
        "notes": list(manifest.notes),
    }
    print(json.dumps({**facts, **found}, indent=1))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m data_pipeline.inspect", description=__doc__)
    parser.add_argument("place", help="folder or address of the data set")
    parser.add_argument("--split", action="append", default=[], help="only this (repeatable)")
    parser.add_argument("--dataset", action="append", default=[], help="only this (repeatable)")
    parser.add_argument("--recipe", nargs="+", metavar="NAME", help="its name, then overrides")
    parser.add_argument("--picture", type=Path, metavar="FILE.png", help="where the picture goes")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    if options.recipe and (options.split or options.dataset):
        parser.error("--recipe draws from the train split what data.datasets names")
    try:
        if options.recipe:
            name, *overrides = options.recipe
            inspect_recipe(options.place, name, overrides, options.picture, options.json)
        else:
            inspect_contents(
                options.place, options.split, options.dataset, options.picture, options.json
            )
    except (DataError, UserError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
