"""The report's section on experts: loads, shares, distances, ways."""

from __future__ import annotations

from unimoe_mcore.reporting import figures
from unimoe_mcore.reporting.document import Block, Folded, Heading, Paragraph, Table, Text
from unimoe_mcore.reporting.results import Results
from unimoe_mcore.reporting.shares import (
    Routing,
    Ways,
    own_experts,
    routing_of,
    way_in_words,
    ways_of,
)

LISTED_WAYS = 10
"""Ways of a modality in the table."""


def routing_section(results: Results) -> list[Block]:
    """Which experts the tokens go to, for every given run with experts."""
    blocks: list[Block] = []
    for run in results.given:
        if run.kind != "moe":
            continue
        routing = routing_of(run)
        if routing is None:
            blocks.append(
                Paragraph(f"{run.title} has not recorded which experts its held-out tokens go to.")
            )
        else:
            blocks += [Heading(3, run.title), *_shares(routing), *_ways(routing)]
    return [Heading(2, "Experts"), *blocks] if blocks else []


def _shares(routing: Routing) -> list[Block]:
    top = routing.run.setting("model.moe.top_k", 2)
    first, rows = own_experts(routing)
    own = (
        f"The modality's own expert is the most used one in {first} of {rows} pairs of block and "
        "modality (video counts as image). The distances say that modalities are routed "
        "differently, not that experts serve their own modality."
    )
    return [
        Paragraph(
            f"Over the held-out questions, prompt and answer; every token goes to {top} experts "
            "and counts once for each. Dashed: an even load."
        ),
        figures.load(routing),
        Paragraph(
            "Modalities apart: total-variation distance between the modalities' shares of experts, "
            "mean over pairs; 0 if all use the experts alike. Beside it the control: the same "
            "figure after shuffling the modality labels over the questions (200 times)."
        ),
        _distances(routing),
        Heading(4, "Expert share per modality"),
        figures.share_of_experts(routing),
        Heading(4, "Modality share per expert"),
        figures.share_of_modalities(routing),
        *([Paragraph(own)] if rows else []),
        Folded("Shares in numbers", [_share_table(routing)]),
    ]


def _distances(routing: Routing) -> Table:
    head = ["block", "between modalities", "labels shuffled", "97.5 % of shuffles below"]
    rows: list[list[Text]] = [
        [str(block), f"{distance:.3f}", f"{mean:.3f}", f"{high:.3f}"]
        for block, distance, (mean, high) in zip(
            routing.blocks, routing.variation, routing.shuffled, strict=True
        )
    ]
    return Table(head, rows)


def _share_table(routing: Routing) -> Table:
    rows: list[list[Text]] = []
    for block, shares in zip(routing.blocks, routing.of_groups(), strict=True):
        for group, row in zip(routing.groups, shares, strict=True):
            rows.append([str(block), group, *(f"{value:.2f}" for value in row)])
    return Table(["block", "modality", *routing.experts], rows, words=2)


def _ways(routing: Routing) -> list[Block]:
    found = ways_of(routing.run, routing)
    if not found:
        return [Paragraph("The ways of tokens through the experts were not recorded.")]
    return [
        Heading(4, "Most travelled ways"),
        Paragraph(
            "A token's way is its first choice, the expert with the largest weight, in every "
            "block with experts. Tokens at the place of a medium and tokens of text are counted "
            f"apart. The pictures show the {figures.SHOWN_WAYS} most travelled ways, the thicker "
            "the more tokens take them."
        ),
        figures.ways(routing, found),
        _top(routing, found),
        Folded("All ways that were kept", [_ways_table(routing, each) for each in found]),
        Folded("Shares of media and text apart", [_kinds_table(routing, found)]),
    ]


def _top(routing: Routing, found: list[Ways]) -> Table:
    head = ["modality", "tokens of", "most travelled way", "share", "tokens", "ways"]
    rows: list[list[Text]] = [
        [
            each.group,
            each.kind,
            way_in_words(each.paths[0][0], routing.experts),
            f"{each.paths[0][1] / max(1, each.tokens):.2f}",
            f"{each.tokens:,}",
            f"{each.distinct:,}",
        ]
        for each in found
        if each.paths
    ]
    return Table(head, rows, words=3)


def _ways_table(routing: Routing, ways: Ways) -> Table:
    head = [f"{ways.group}, {ways.kind}: the first {LISTED_WAYS}", "share", "tokens"]
    rows: list[list[Text]] = [
        [way_in_words(way, routing.experts), f"{count / max(1, ways.tokens):.3f}", f"{count:,}"]
        for way, count in ways.paths[:LISTED_WAYS]
    ]
    return Table(head, rows)


def _kinds_table(routing: Routing, found: list[Ways]) -> Table:
    rows: list[list[Text]] = []
    for number, block in enumerate(routing.blocks):
        for each in found:
            counts = each.choices[number]
            shares = counts / max(1, counts.sum())
            rows.append([str(block), each.group, each.kind, *(f"{share:.2f}" for share in shares)])
    return Table(["block", "modality", "tokens of", *routing.experts], rows, words=3)
