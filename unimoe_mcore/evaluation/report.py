"""The report: Markdown with pictures, written so that a stranger can read it."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from unimoe_mcore.evaluation.plots import plot_accuracy, plot_experts, plot_losses
from unimoe_mcore.evaluation.results import (
    ExpertShare,
    Judged,
    Results,
    expert_shares,
    loss_changes,
)
from unimoe_mcore.evaluation.statistics import clearly_differ

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


def write_report(results: Results, experts: Sequence[str], folder: Path) -> Path:
    """Write ``report.md`` and its pictures.

    Args:
        experts: names of the experts of the last stage, in order.

    Returns:
        The report's path.
    """
    folder.mkdir(parents=True, exist_ok=True)
    plot_losses(results, folder / "losses.png")
    plot_accuracy(results, folder / "accuracy.png")
    shares = expert_shares(results.columns[-1])
    if shares:
        plot_experts(shares, experts, folder / "experts.png")
    sections = [
        _head(results),
        _verdict(results),
        "## Held-out questions\n\n![accuracy](accuracy.png)\n\n" + accuracy_table(results),
        "## What each stage changed\n\n" + changes_table(results.columns),
        "## Held-out loss\n\n" + loss_table(results),
        "## Training\n\n![losses](losses.png)\n\n" + _time_table(results),
    ]
    if shares:
        sections.append("## Which experts the tokens go to\n\n" + _routing(shares, experts))
    path = folder / "report.md"
    path.write_text("\n\n".join(sections) + "\n", encoding="utf8")
    return path


def _head(results: Results) -> str:
    version = next(reversed(results.versions.values()))
    packages = ", ".join(f"{name} {number}" for name, number in version["packages"].items())
    lines = [
        "# What the model learnt",
        f"{datetime.now(UTC):%Y-%m-%d}, commit {short(version['commit'])}, {version['cpu']}, "
        f"{version['cores']} cores, Python {version['python']}, {packages}.",
    ]
    lines += [f"Note: {note}" for note in results.notes]
    return "\n\n".join(lines)


def not_above_majority(results: Results) -> list[str]:
    """Tasks whose 95 % interval does not lie above the majority answer after the last stage."""
    scores = results.columns[-1].scores()
    return [
        task
        for task in results.tasks()
        if task in scores and scores[task].interval[0] <= results.majority.get(task, 0.0)
    ]


def mean_exact(judged: Judged) -> float:
    """Mean over tasks of the share of exact answers."""
    scores = judged.scores()
    return sum(score.share for score in scores.values()) / max(1, len(scores))


def short(commit: str) -> str:
    """Twelve digits of a commit, and ``+`` where files differed from it."""
    return commit[:12] + ("+" if commit.endswith("+") else "")


def _verdict(results: Results) -> str:
    last = results.columns[-1]
    below = not_above_majority(results)
    risen = [g for g, change in loss_changes(results.columns).items() if not change.lower]
    lines = [
        f"- The final model answers **{mean_exact(last):.0%}** of the held-out questions exactly "
        f"(mean over {len(last.scores())} tasks, {len(last.records)} questions).",
        "- Every task is above its majority answer beyond the 95 % interval."
        if not below
        else f"- **Not above the majority answer** beyond the 95 % interval: {', '.join(below)}.",
        "- The held-out loss of every modality fell by more than its 95 % interval."
        if not risen
        else f"- **Held-out loss did not fall** by more than its interval: {', '.join(risen)}.",
    ]
    return "\n".join(lines)


def accuracy_table(results: Results) -> str:
    """Exact match per task and stage, beside majority answer, number and interval."""
    columns = [(column.title, column.scores()) for column in results.columns]
    head = ["task", "questions", "majority", *(title for title, _ in columns), "95 % interval"]
    rows = [head, ["---"] * len(head)]
    for task in results.tasks():
        cells = [f"{scores[task].share:.2f}" if task in scores else "" for _, scores in columns]
        last = columns[-1][1].get(task)
        low, high = last.interval if last else (0.0, 1.0)
        total = str(last.total) if last else ""
        majority = f"{results.majority.get(task, 0.0):.2f}"
        name = f"`{task}` {TASKS.get(task, '')}".strip()
        rows.append([name, total, majority, *cells, f"{low:.2f} to {high:.2f}"])
    asked = len(results.columns[-1].scores())
    means = [
        f"**{mean_exact(column):.2f}**" if len(column.scores()) == asked else ""
        for column in results.columns
    ]
    rows.append(["**mean**", "", "", *means, ""])
    explained = (
        "Share of exactly right answers after each stage: every token of the answer is the "
        "likeliest one given the right ones before it, so greedy decoding gives exactly that "
        "answer. One run, one seed. The interval (Wilson, 95 %) is that of "
        "the last column; *majority* is what always giving the most frequent answer would score."
    )
    return _table(rows) + "\n\n" + explained


def changes_table(columns: Sequence[Judged]) -> str:
    """Questions that a stage answers and the one before did not, and the other way round.

    Stage 1 against the start, every expert against stage 1, the mixture against every expert.
    """
    by_title = {column.title: column for column in columns}
    experts = [title for title in by_title if title.startswith("stage2-")]
    pairs = [("before stage1", "stage1"), *(("stage1", expert) for expert in experts)]
    pairs += [(expert, "stage3") for expert in experts]
    rows = [["from", "to", "questions gained", "lost", ""], ["---"] * 5]
    for before, after in pairs:
        if before not in by_title or after not in by_title:
            continue
        was = {(r["dataset"], r["key"]): r["exact"] for r in by_title[before].records}
        both = [(was[key], r["exact"]) for r in by_title[after].records
                if (key := (r["dataset"], r["key"])) in was]  # fmt: skip
        gained = sum(now and not then for then, now in both)
        lost = sum(then and not now for then, now in both)
        clear = "" if clearly_differ(gained, lost) else "within chance"
        rows.append([before, after, str(gained), str(lost), clear])
    explained = (
        "On the same questions. *Within chance*: gains and losses do not differ beyond what "
        "McNemar's test allows at 5 %. An expert changes what belongs to its own modality; the "
        "mixture is compared with each expert alone."
    )
    return _table(rows) + "\n\n" + explained


def loss_table(results: Results) -> str:
    """Held-out loss per modality, before its first stage and after the last."""
    last = results.columns[-1]
    head = ["modality", "questions", "before", f"after {last.title}", "change", "95 % interval", ""]
    rows = [head, ["---"] * len(head)]
    for group, change in loss_changes(results.columns).items():
        low, high = change.difference - change.half_width, change.difference + change.half_width
        rows.append(
            [
                group,
                str(change.questions),
                f"{change.before:.3f}",
                f"{change.after:.3f}",
                f"{change.difference:+.3f}",
                f"{low:+.3f} to {high:+.3f}",
                "lower" if change.lower else "**not lower**",
            ]
        )
    explained = (
        "Loss per label token, before a modality's first stage (the base for text, stage 1 for all "
        "else) and after the last. The change is the mean over questions of the difference on the "
        "same question, with its paired interval."
    )
    return _table(rows) + "\n\n" + explained


def _time_table(results: Results) -> str:
    rows = [["run", "steps", "seconds in steps", "tokens/s (median)"], ["---"] * 4]
    for name, lines in results.curves.items():
        speeds = sorted(line["tokens_per_second"] for line in lines)
        steps = lines[-1]["step"] if lines else 0
        speed = f"{speeds[len(speeds) // 2]}" if speeds else ""
        rows.append([name, str(steps), f"{results.seconds[name]:.0f}", speed])
    return _table(rows)


def _routing(shares: Sequence[ExpertShare], experts: Sequence[str]) -> str:
    head = ["block", "modality", *experts]
    rows = [head, ["---"] * len(head)]
    for share in shares:
        for group, row in zip(share.groups, share.shares, strict=True):
            rows.append([str(share.block), group, *(f"{value:.2f}" for value in row)])
    distance = [["block", "between modalities", "labels shuffled", "97.5 % of shuffles below"]]
    distance.append(["---"] * 4)
    distance += [
        [str(s.block), f"{s.variation:.3f}", f"{s.shuffled:.3f}", f"{s.shuffled_high:.3f}"]
        for s in shares
    ]
    return "\n\n".join(
        [
            "![experts](experts.png)",
            "Share of the (token, expert) assignments of each modality's questions; every token "
            "goes to two experts, so a row sums to one and one expert gets at most a half.",
            _table(rows),
            "Total-variation distance between the modalities' shares, mean over pairs: 0 if all "
            "modalities use the experts alike. Beside it the same figure after shuffling the "
            "modality labels over the questions (200 times).",
            _table(distance),
            own_experts(shares, experts),
        ]
    )


def own_experts(shares: Sequence[ExpertShare], experts: Sequence[str]) -> str:
    """One sentence: in how many rows the modality's own expert is the most used one."""
    rows, first = 0, 0
    for share in shares:
        for group, row in zip(share.groups, share.shares, strict=True):
            own = "image" if group == "video" else group
            if own in experts:
                rows += 1
                first += experts[int(row.argmax())] == own
    return (
        f"The modality's own expert is the most used one in {first} of {rows} rows (video counts "
        "as image). The distances say that modalities are routed differently, not that experts "
        "serve their own modality."
    )


def _table(rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
