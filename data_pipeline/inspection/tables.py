"""What was found out, as plain tables and sentences for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from data_pipeline.inspection.contents import MEASURES, Contents, Group, summary_of
from data_pipeline.inspection.outlook import Drawn, Layout, Outlook, Phase
from data_pipeline.modalities import MODALITIES, modality
from data_pipeline.reading.transfer import shown
from data_pipeline.shards.index import Manifest

WIDTH = 100
"""Most characters of a line."""


def show(parts: Iterable[RenderableType]) -> None:
    """Print tables and sentences; nothing in them is taken for markup."""
    plain = Console(markup=False, highlight=False, emoji=False)
    plain.width = min(WIDTH, plain.width) if plain.is_terminal else WIDTH
    for part in parts:
        plain.print(part)


def printable(text: str) -> str:
    """Text from a file, without what a terminal would obey."""
    return "".join(each if each.isprintable() else "?" for each in text)


def _table(*columns: str, words: int = 1) -> Table:
    """A table whose first columns hold words and whose others hold numbers."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 2, 0, 0), pad_edge=False)
    for number, column in enumerate(columns):
        justify = "left" if number < words else "right"
        table.add_column(column, justify=justify, overflow="fold")  # type: ignore[arg-type]
    return table


def contents_parts(manifest: Manifest, contents: Contents) -> Iterator[RenderableType]:
    """Tables of what lies in a data set, and the notes of its builder."""
    place = printable(shown(manifest.url) or str(manifest.folder))
    options = ", ".join(f"{name}={value}" for name, value in manifest.options.items())
    made = printable(f"{manifest.builder}, seed {manifest.seed}{options and ', '}{options}")
    yield f"{place}: made by {made}"
    for note in manifest.notes:
        yield f"note: {printable(note)}"
    for split in contents.splits():
        yield from _split_table(contents, split)
    for split in contents.splits():
        if any(group.summary() for group in contents.of_split(split)):
            yield from _lengths_table(contents, split)
    yield from _remarks(contents)


def _split_table(contents: Contents, split: str) -> Iterator[RenderableType]:
    groups = contents.of_split(split)
    size = _size(sum(group.bytes for group in groups))
    yield Text(f"{split}: {sum(group.samples for group in groups):,} samples, {size}", "bold")
    columns = ("dataset", "combination", "media", "samples", "shards", "size")
    table = _table(*columns, "answers", "majority", words=3)
    before = ""
    for group in groups:
        facts = contents.facts.get((split, group.dataset))
        again = group.dataset == before  # another combination of it: the facts are the dataset's
        told = (
            ["", ""] if again or facts is None else [f"{facts.answers:,}", f"{facts.majority:.1%}"]
        )
        table.add_row(
            "" if again else group.dataset,
            group.combination,
            "\n".join(_media(group, modality) for modality in group.media),
            f"{group.samples:,}",
            f"{group.shards:,}",
            _size(group.bytes),
            *told,
        )
        before = group.dataset
    yield table


def _media(group: Group, name: str) -> str:
    words = f"{group.media[name]:,} {name}"
    if modality(name).length is not None:
        words += f", {_seconds(group.total(name))}"
    if name == "video":
        words += f", {int(group.total('frames')):,} frames"
    return words


def _lengths_table(contents: Contents, split: str) -> Iterator[RenderableType]:
    groups = contents.of_split(split)
    columns = ("", "combination", "smallest", "median", "mean", "largest")
    yield Text(f"{split}: lengths", "bold")
    table = _table(*columns, words=2)
    for measure, unit in MEASURES.items():
        mine = [group for group in groups if len(group.lengths.get(measure, ()))]
        if not mine:
            continue
        table.add_section()
        table.add_row("frames of video" if measure == "frames" else f"{measure}, {unit}")
        for group in mine:
            numbers = summary_of(group.lengths[measure])
            places = {"smallest": 0, "median": 0, "mean": 1, "largest": 0}
            if unit == "seconds":
                places = dict.fromkeys(places, 2)
            cells = [f"{numbers[name]:,.{digits}f}" for name, digits in places.items()]
            table.add_row(f"  {group.dataset}", group.combination, *cells)
    yield table


def _remarks(contents: Contents) -> Iterator[str]:
    groups = contents.groups
    if not contents.texts:
        yield "The shards are elsewhere: texts were not read."
    elif any(group.texts_read < group.samples for group in groups):
        read = sum(group.texts_read for group in groups)
        yield (
            f"Lengths of texts: {read:,} of {sum(group.samples for group in groups):,} were read, "
            "evenly spread over each dataset; the extremes are those of the texts read."
        )
    if headless := sum(group.headless for group in groups):
        yield (
            f"{headless:,} recordings or clips have no length in the index, they are damaged: "
            "python -m data_pipeline.verify names them."
        )
    mixed = dict.fromkeys(f"{g.split}/{g.dataset}" for g in groups if g.mixed)
    if mixed:
        yield (
            f"{', '.join(mixed)}: shards with several combinations, for data.compose=mixed with "
            "data.deal=balanced only; python -m data_pipeline.build index --rewrite divides them."
        )


def outlook_parts(outlook: Outlook, remarks: Sequence[str]) -> Iterator[RenderableType]:
    """Tables of what a recipe makes of a data set."""
    for phase in outlook.phases:
        yield from _mixture_table(phase)
        if any(each.work for each in phase.drawn):
            yield from _encoders_table(phase)
        if phase.layout is not None:
            yield _layout_words(phase.layout)
    for step in outlook.unused:
        yield f"The change at step {step} comes after the last step of the run."
    yield from remarks
    for refusal in outlook.refusals:
        yield f"A run would be refused: {refusal}."


def _mixture_table(phase: Phase) -> Iterator[RenderableType]:
    yield Text(
        f"steps {phase.first + 1:,} to {phase.end:,}: {phase.global_samples:,} samples and "
        f"{phase.tokens:,.0f} tokens a step, {phase.compose}",
        "bold",
    )
    columns = ("has", "of samples", "a step", "tokens", "longest", "a step", "of tokens", "epochs")
    table = _table("dataset", *columns)
    for combination, rows in _by_combination(phase):
        table.add_section()
        table.add_row(
            combination,
            f"{sum(each.count for each in rows):,}",
            f"{sum(each.share for each in rows):.1%}",
            _average(sum(each.samples for each in rows)),
            "",
            "",
            f"{sum(each.tokens for each in rows):,.0f}",
            f"{sum(each.token_share for each in rows):.1%}",
            style="bold",
        )
        for each in rows:
            table.add_row(
                f"  {each.dataset}",
                f"{each.count:,}",
                f"{each.share:.1%}",
                _average(each.samples),
                _average(each.tokens_each),
                f"{each.longest:,}",
                f"{each.tokens:,.0f}",
                f"{each.token_share:.1%}",
                f"{each.epochs:.2f}",
            )
    yield table


def _by_combination(phase: Phase) -> Iterator[tuple[str, list[Drawn]]]:
    for combination in dict.fromkeys(each.combination for each in phase.drawn):
        yield combination, [each for each in phase.drawn if each.combination == combination]


def _encoders_table(phase: Phase) -> Iterator[RenderableType]:
    present = [m for m in MODALITIES if any(m in each.work for each in phase.drawn)]
    total = {m: sum(each.work.get(m, 0.0) for each in phase.drawn) for m in present}
    priced = phase.encoders is not None
    title = "what encoders compute in a step, and shares in it"
    if priced:
        title += f" (in all {phase.encoders:.1%} of all work, by the recipe's costs)"
    yield Text(title, "bold")
    columns = [modality(name).unit for name in present]
    table = _table("dataset", *columns, *(["of their work"] if priced else []))
    for each in phase.drawn:
        if not each.work:
            continue
        cells = [
            f"{_average(each.work[m])} ({each.work[m] / total[m]:.0%})" if m in each.work else ""
            for m in present
        ]
        share = [f"{each.encoder_share:.1%}"] if each.encoder_share is not None else []
        table.add_row(f"{each.dataset} ({each.combination})", *cells, *share)
    table.add_section()
    table.add_row("all", *(_average(total[m]) for m in present))
    yield table


def _layout_words(layout: Layout) -> str:
    least, mean, most = layout.microbatches
    ranks = f"{layout.ranks:,} data-parallel rank{'s' if layout.ranks > 1 else ''}"
    number = f"{most} micro-batch{'es' if most > 1 else ''}"
    if least < most:
        number = f"{least} to {number}, {mean:.2f} on average,"
    empty = f", {layout.empty:.1%} of them empty" if layout.empty else ""
    return (
        f"Dealt to {ranks}, {layout.deal}: {number} on each in a step, of {layout.tokens:,.0f} "
        f"tokens{empty}; {layout.padding:.1%} of the places are padding ({layout.steps} steps "
        "were dealt)."
    )


def _average(number: float) -> str:
    return f"{number:,.1f}" if number < 1000 else f"{number:,.0f}"


def _size(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"


def _seconds(seconds: float) -> str:
    return f"{seconds / 3600:,.1f} h" if seconds >= 7200 else f"{seconds:,.0f} s"
