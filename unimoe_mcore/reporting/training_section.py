"""The report's section on training: curves, throughput, padding, waiting."""

from __future__ import annotations

import statistics

from unimoe_mcore.reporting import figures
from unimoe_mcore.reporting.document import Block, Heading, Paragraph, Table, Text
from unimoe_mcore.reporting.results import Results
from unimoe_mcore.reporting.runs import Run


def training_section(results: Results) -> list[Block]:
    """Loss curves of all runs, and what their steps cost."""
    runs = [run for run in results.runs if run.metrics]
    blocks: list[Block] = [Heading(2, "Training")]
    if not runs:
        return [*blocks, Paragraph("No step has been recorded yet.")]
    blocks += [
        figures.curves(runs),
        Paragraph(
            "Loss per label token of each modality, smoothed. Circles: the same on held-out "
            "questions, where the run was validated."
        ),
        Table(
            [
                "run",
                "steps",
                "samples",
                "tokens",
                "label tokens",
                "padding",
                "tokens/s",
                "minutes",
                "data wait",
                "in collectives",
                "memory",
            ],
            [_cost(run) for run in runs],
        ),
        Paragraph(
            "Samples, tokens and label tokens are those of all steps and processes. Padding: share "
            "of the packed rows. Tokens/s: median over steps. Minutes: sum over steps. Data wait: "
            "share of these that the first process waited for its data. In collectives: share "
            "spent in communication, waiting for slower processes included. Memory: most of any "
            "process."
        ),
    ]
    return blocks


def _cost(run: Run) -> list[Text]:
    def total(key: str) -> float:
        return sum(_numbers(run, key))

    seconds, rows = total("seconds"), total("row_tokens")
    speeds, memory = _numbers(run, "tokens_per_second"), _numbers(run, "memory_bytes")
    # Lines of an older version have no rows: the share is over those that have.
    packed = sum(_numbers(run, "tokens", needs="row_tokens"))

    def share(part: float, key: str) -> str:
        return f"{part / seconds:.1%}" if seconds and _numbers(run, key) else ""

    return [
        run.title,
        str(run.taken),
        f"{total('samples'):,.0f}",
        f"{total('tokens'):,.0f}",
        f"{total('label_tokens'):,.0f}",
        f"{1 - packed / rows:.1%}" if rows else "",
        f"{statistics.median(speeds):,.0f}" if speeds else "",
        f"{seconds / 60:.1f}",
        share(total("data_seconds"), "data_seconds"),
        share(total("communication_seconds"), "communication_seconds"),
        f"{max(memory) / 2**30:.1f} GiB" if memory else "",
    ]


def _numbers(run: Run, key: str, needs: str = "") -> list[float]:
    return [
        line[key]
        for line in run.metrics
        if isinstance(line.get(key), int | float) and (not needs or needs in line)
    ]
