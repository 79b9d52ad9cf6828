"""The report's sections: what the results say, in words, tables and figures."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from unimoe_mcore.reporting import figures
from unimoe_mcore.reporting.document import (
    Block,
    Bullets,
    Code,
    Document,
    Examples,
    Folded,
    Heading,
    Listing,
    Paragraph,
    Strong,
    Table,
    Text,
)
from unimoe_mcore.reporting.examples import examples
from unimoe_mcore.reporting.results import (
    Compared,
    Judged,
    Results,
    loss_changes,
    run_changes,
    stage_changes,
)
from unimoe_mcore.reporting.routing_section import routing_section
from unimoe_mcore.reporting.seeds import repeated, spread
from unimoe_mcore.reporting.training_section import training_section

TASKS = {
    "img_group": "which kind of thing is the picture (unseen emoji)",
    "img_count": "how many objects are in the picture (unseen drawings)",
    "img_left": "what is on the left (unseen pairs)",
    "img_digit": "which handwritten digit is it (unseen images)",
    "vid_dir": "which way does the object move (unseen drawings)",
    "spk_qa": "answer a spoken question about a capital (unseen voice)",
    "spk_digit": "which digit is spoken (unseen languages)",
    "aud_drum": "which instrument is this sound (unseen drum kits)",
    "txt_cap": "name the capital (unseen wording)",
}

KINDS = {
    "base": "base",
    "align": "stage 1",
    "expert": "stage 2",
    "dense": "stage 3, dense",
    "moe": "stage 3, mixture of experts",
}


def document(results: Results) -> Document:
    """The whole report."""
    blocks: list[Block] = [
        *_head(results),
        *_answers(results),
        *_held_out_loss(results),
        *training_section(results),
        *routing_section(results),
        *_examples(results),
        *_configuration(results),
    ]
    return Document(blocks)


def _head(results: Results) -> list[Block]:
    titles = ", ".join(run.title for run in results.given)
    blocks: list[Block] = [Heading(1, f"Report: {titles}"), Paragraph(_where_from(results))]
    if results.notes:
        blocks.append(Bullets([[Strong("Note: "), note] for note in results.notes]))
    for judged in results.finals:
        blocks += [*([Heading(3, judged.title)] if len(results.finals) > 1 else [])]
        blocks.append(Bullets(_verdict(results, judged)))
    head = ["run", "stage", "state", "stands on", "parameters", "trained"]
    rows: list[list[Text]] = []
    for run in results.runs:
        start = run.event("start")
        title: Text = Strong(run.title) if run in results.given else run.title
        stands_on = ", ".join(each.title for each in run.stands_on) or "-"
        sizes = [_millions(start.get("parameters")), _millions(start.get("trained"))]
        rows.append([title, KINDS.get(run.kind, run.kind), run.state, stands_on, *sizes])
    return [*blocks, Heading(2, "Runs"), Table(head, rows, words=4)]


def _millions(number: Any) -> str:
    return f"{number / 1e6:.2f} M" if isinstance(number, int) else ""


def _where_from(results: Results) -> str:
    version = results.given[-1].version
    packages = version.get("packages")
    named = packages.items() if isinstance(packages, dict) else []
    facts = [
        f"{datetime.now(UTC):%Y-%m-%d}",
        f"commit {short(str(version.get('commit', 'unknown')))}",
        f"{version.get('cpu', 'unknown processor')}",
        f"{version.get('cores', '?')} cores",
        f"Python {version.get('python', '?')}",
        *(f"{name} {number}" for name, number in named),
    ]
    return ", ".join(facts) + "."


def short(commit: str) -> str:
    """Twelve digits of a commit, and ``+`` where files differed from it."""
    return commit[:12] + ("+" if commit.endswith("+") else "")


def not_above_majority(results: Results, judged: Judged) -> list[str]:
    """Tasks whose 95 % interval does not lie above the majority answer."""
    scores = judged.scores()
    return [
        task
        for task in results.tasks()
        if task in scores
        and task in results.majority
        and scores[task].interval[0] <= results.majority[task]
    ]


def _verdict(results: Results, judged: Judged) -> list[Text]:
    below = not_above_majority(results, judged)
    changes = loss_changes(results, judged)
    risen = [group for group, change in changes.items() if not change.lower]
    lines: list[Text] = [
        [
            "It answers ",
            Strong(f"{judged.mean():.0%}"),
            f" of the held-out questions exactly (mean over {len(judged.scores())} tasks, "
            f"{len(judged.records)} questions).",
        ]
    ]
    if below:
        lines.append(
            [
                Strong("Not above the majority answer"),
                f" beyond the 95 % interval: {', '.join(below)}.",
            ]
        )
    elif results.majority:
        lines.append("Every task is above its majority answer beyond the 95 % interval.")
    if risen:
        lines.append(
            [
                Strong("Held-out loss did not fall"),
                f" by more than its interval: {', '.join(risen)}.",
            ]
        )
    elif changes:
        lines.append("The held-out loss of every modality fell by more than its 95 % interval.")
    return lines


def _answers(results: Results) -> list[Block]:
    blocks: list[Block] = [Heading(2, "Held-out questions")]
    if not results.stages:
        return [*blocks, Paragraph("No run has answered any yet.")]
    if results.finals:
        blocks += [figures.accuracy(results), answers_table(results), Paragraph(_EXACT)]
        blocks += _by_modality(results)
    if any(judged not in results.finals for judged in results.stages):
        blocks += [Heading(3, "After each stage"), stages_table(results)]
    for title, pairs, words in (
        ("What each stage changed", stage_changes(results), _CHANGED),
        ("Run against run", run_changes(results), ""),
    ):
        if pairs:
            blocks += [Heading(3, title), _pairs_table(pairs)]
            blocks += [Paragraph(words)] if words else []
    return blocks


_EXACT = (
    "Share of exactly right answers after training: every token of the answer is the likeliest "
    "one given the right ones before it, so greedy decoding gives exactly that answer. In "
    "brackets the 95 % interval (Wilson); majority is what always giving the most frequent answer "
    "would score. The interval is over questions: another seed gives another model."
)
_CHANGED = (
    "Questions that the second answers and the first does not, and the other way round, among "
    "those that both were asked. Within chance: gains and losses do not differ beyond what "
    "McNemar's test allows at 5 %."
)


def answers_table(results: Results) -> Table:
    """Exact answers per task beside the majority answer, one column for every given run."""
    columns = [judged.scores() for judged in results.finals]
    head = ["task", "questions", "majority", *(judged.title for judged in results.finals)]
    rows: list[list[Text]] = []
    for task in results.tasks():
        found = [scores[task] for scores in columns if task in scores]
        if not found:
            continue
        totals = "/".join(dict.fromkeys(str(score.total) for score in found))
        cells = [_with_interval(scores.get(task)) for scores in columns]
        name: Text = [Code(task), f" {TASKS[task]}"] if task in TASKS else Code(task)
        rows.append([name, totals, _majority(results, task), *cells])
    means = [f"{judged.mean():.2f}" for judged in results.finals]
    rows.append([Strong("mean"), "", "", *(Strong(mean) for mean in means)])
    return Table(head, rows)


def _with_interval(score: Any) -> str:
    if score is None:
        return ""
    low, high = score.interval
    return f"{score.share:.2f} {_interval(low, high)}"


def _interval(low: float, high: float, form: str = ".2f") -> str:
    """In brackets, kept together on a line."""
    return f"({low:{form}}\u00a0to\u00a0{high:{form}})"


def _majority(results: Results, task: str) -> str:
    return f"{results.majority[task]:.2f}" if task in results.majority else ""


def _by_modality(results: Results) -> list[Block]:
    """The same by modality, all questions together."""
    columns = [judged.scores(by="group") for judged in results.finals]
    rows: list[list[Text]] = [
        [
            group,
            "/".join(dict.fromkeys(str(s[group].total) for s in columns if group in s)),
            *(_with_interval(scores.get(group)) for scores in columns),
        ]
        for group in results.groups()
        if any(group in scores for scores in columns)
    ]
    head = ["modality", "questions", *(judged.title for judged in results.finals)]
    return [Heading(3, "By modality"), Table(head, rows), *_over_seeds(results)]


def _over_seeds(results: Results) -> list[Block]:
    """The same over the runs of a recipe, where several that differ in seeds only were given."""
    recipes = repeated(results)
    if not recipes:
        return []
    rows: list[list[Text]] = []
    for group in results.groups():
        scores = [[judged.scores(by="group") for judged in same] for same in recipes]
        if all(group in each for same in scores for each in same):
            rows.append([group, *(spread(each[group].share for each in same) for same in scores)])
    means = [Strong(spread(judged.mean() for judged in same)) for same in recipes]
    rows.append([Strong("mean over tasks"), *means])
    head = ["modality", *(", ".join(judged.title for judged in same) for same in recipes)]
    words = (
        "Mean over runs of one recipe that differ in their seeds only, and in brackets the lowest "
        "and the highest of them."
    )
    return [Heading(3, "Over seeds"), Table(head, rows), Paragraph(words)]


def stages_table(results: Results) -> Table:
    """Exact answers per task after every stage of all runs."""
    columns = [judged.scores() for judged in results.stages]
    head = ["task", "majority", *(judged.title for judged in results.stages)]
    rows: list[list[Text]] = [
        [
            Code(task),
            _majority(results, task),
            *(f"{scores[task].share:.2f}" if task in scores else "" for scores in columns),
        ]
        for task in results.tasks()
    ]
    asked = max((len(scores) for scores in columns), default=0)
    means = [
        f"{judged.mean():.2f}" if len(scores) == asked else ""
        for judged, scores in zip(results.stages, columns, strict=True)
    ]
    rows.append([Strong("mean"), "", *(Strong(mean) if mean else "" for mean in means)])
    return Table(head, rows)


def _pairs_table(pairs: Sequence[Compared]) -> Table:
    rows: list[list[Text]] = [
        [
            pair.before.title,
            pair.after.title,
            "" if pair.clear else "within chance",
            str(pair.both),
            str(pair.gained),
            str(pair.lost),
        ]
        for pair in pairs
    ]
    return Table(["from", "to", "", "questions", "gained", "lost"], rows, words=3)


def _held_out_loss(results: Results) -> list[Block]:
    blocks: list[Block] = []
    for judged in results.finals:
        rows: list[list[Text]] = []
        for group, change in loss_changes(results, judged).items():
            low, high = change.difference - change.half_width, change.difference + change.half_width
            rows.append(
                [
                    group,
                    "lower" if change.lower else Strong("not lower"),
                    str(change.questions),
                    f"{change.before:.3f}",
                    f"{change.after:.3f}",
                    f"{change.difference:+.3f} {_interval(low, high, '+.3f')}",
                ]
            )
        if rows:
            head = ["modality", "", "questions", "before", f"after {judged.title}", "change"]
            blocks.append(Table(head, rows, words=2))
    if not blocks:
        return []
    return [Heading(2, "Held-out loss"), *blocks, Paragraph(_LOSS)]


_LOSS = (
    "Loss per label token, before a modality's first stage (the base for text, stage 1 for all "
    "else) and after the run. The change is the mean over questions of the difference on the same "
    "question, with its paired 95 % interval."
)


def _examples(results: Results) -> list[Block]:
    items = examples(results)
    if not items:
        return []
    words = (
        f"Questions of the {results.split} split: of each modality right and wrong ones by turns, "
        f"by {results.finals[0].title}. They are chosen by a checksum of their names, not by hand. "
        "An answer ends at the first token that is not the right one; ... stands for what would "
        "follow. Pictures and sounds are made smaller."
    )
    return [Heading(2, "Examples"), Paragraph(words), Examples(items)]


def _configuration(results: Results) -> list[Block]:
    folded = [
        Folded(f"{run.title}: config.yaml", [Listing(run.config_text)]) for run in results.runs
    ]
    return [Heading(2, "Configuration"), *folded]
