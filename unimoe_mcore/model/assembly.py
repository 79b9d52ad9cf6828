"""Where each tensor of a stage's model comes from: base, artefacts, or fresh.

Pure bookkeeping over names; ``unimoe_mcore.checkpoints.loading`` does the reading.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

EXPERTS = re.compile(r"\.mlp\.experts\.experts\.(linear_fc[12]\.weight)$")
"""Stacked expert weights, ``[experts, out, in]`` on disk."""

SHARED = re.compile(r"\.mlp\.shared_experts\.(linear_fc[12]\.weight)$")
"""Weights of the MLP that every token of a block with experts passes."""

_FRESH = re.compile(r"\.lora_[ab]\.|\.mlp\.router\.")
_TOWER = re.compile(r"^(connector|encoder)\.([^.]+)\.")


@dataclass(frozen=True)
class Origin:
    """Source of a tensor.

    Attributes:
        kind: ``base``, ``experts`` (slice e of the first axis is the dense weight ``name`` of
            expert e's artefact), ``shared`` (the dense weight ``name`` of the shared expert's
            artefact), ``connector``, ``encoder`` or ``fresh`` (initialised by this run).
        name: the tensor's name in its source.
        tower: for a connector or an encoder, its tower.
    """

    kind: str
    name: str
    tower: str = ""


def origin(name: str) -> Origin:
    """Where the tensor called ``name`` on disk comes from in a stage that stands on a base."""
    tower = _TOWER.match(name)
    if tower:
        return Origin(tower[1], name, tower[2])
    if _FRESH.search(name):
        return Origin("fresh", name)
    if EXPERTS.search(name):
        return Origin("experts", EXPERTS.sub(r".mlp.\1", name))
    if SHARED.search(name):
        return Origin("shared", SHARED.sub(r".mlp.\1", name))
    return Origin("base", name)


def is_mlp(name: str) -> bool:
    """Whether a base's tensor belongs to the MLPs that become experts."""
    return re.search(r"\.mlp\.linear_fc[12]\.weight$", name) is not None
