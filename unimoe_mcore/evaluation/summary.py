"""What held-out answers come to: exact answers by dataset, losses by group of samples."""

from __future__ import annotations

from typing import Any

import numpy as np

from unimoe_mcore.config.errors import UserError
from unimoe_mcore.training.agreement import decided_by_first_rank

ROUTING = "router/groups"
"""Name of the shares in a line of ``validation.jsonl``, as in ``metrics.jsonl``."""


def summary(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Share of exact answers per dataset, and loss per label token per group."""
    exact: dict[str, list[bool]] = {}
    losses: dict[str, list[tuple[float, int]]] = {}
    for record in records:
        exact.setdefault(record["dataset"], []).append(record["exact"])
        losses.setdefault(record["group"], []).append((record["loss"], record["tokens"]))
    return {
        "exact": {name: sum(hits) / len(hits) for name, hits in exact.items()},
        "loss": {
            name: sum(loss for loss, _ in pairs) / max(1, sum(tokens for _, tokens in pairs))
            for name, pairs in losses.items()
        },
    }


def routing_shares(records: list[dict[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """Where tokens went: block -> group of samples -> share of every expert.

    Empty if the records have no ``experts``.
    """
    counts: dict[str, dict[str, Any]] = {}
    for record in records:
        for block, tokens in record.get("experts", {}).items():
            groups = counts.setdefault(block, {})
            groups[record["group"]] = groups.get(record["group"], 0) + np.array(tokens)
    return {
        block: {name: (row / max(1, row.sum())).round(6).tolist() for name, row in groups.items()}
        for block, groups in counts.items()
    }


def held_out_losses(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Losses, exact answers, and shares of the experts if they were recorded, on every rank.

    Args:
        records: rank 0's, as ``ask`` returns them.

    Raises:
        UserError: if no question could be read.
    """

    def of_records() -> dict[str, Any]:
        tokens = sum(record["tokens"] for record in records)
        if not tokens:
            raise UserError(
                "none of the questions of trainer.validation.split could be read: choose another "
                "split, or set trainer.validation.every=0"
            )
        found, routing = summary(records), routing_shares(records)
        return {
            "answered": len(records),
            "loss": sum(record["loss"] for record in records) / tokens,
            **{f"loss/{name}": loss for name, loss in sorted(found["loss"].items())},
            **{f"exact/{name}": share for name, share in found["exact"].items()},
            **({ROUTING: routing} if routing else {}),
        }

    return decided_by_first_rank(of_records)


def words(exact: dict[str, float]) -> str:
    """Shares of exact answers in a line."""
    mean = sum(exact.values()) / max(1, len(exact))
    each = ", ".join(f"{name} {share:.2f}" for name, share in exact.items())
    return f"held-out questions right: {each}; mean {mean:.3f}"
