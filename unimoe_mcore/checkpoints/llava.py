"""LLaVA's projector of pictures as a connector that stands on its language model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from unimoe_mcore.checkpoints.deferred import Deferred
from unimoe_mcore.checkpoints.facts import Facts, shown, size, text
from unimoe_mcore.checkpoints.hf_config import CONFIG
from unimoe_mcore.checkpoints.llama import Rule
from unimoe_mcore.checkpoints.published import Part
from unimoe_mcore.config.towers import ConnectorConfig, TowerConfig

FOLDER = "connector-image"
_THEIRS, _OURS = "model.mm_projector.", "connector.image.project."

PROJECTOR = tuple(
    Rule(f"{_OURS}{layer}.{kind}", (f"{_THEIRS}{layer}.{kind}",), (shape,))
    for layer, kind, shape in (
        (0, "weight", ("hidden", "features")),
        (0, "bias", ("hidden",)),
        (2, "weight", ("hidden", "hidden")),
        (2, "bias", ("hidden",)),
    )
)
"""``mlp2x_gelu``: two linear layers with a GELU between them."""

PATCHES = 576
"""Features of a picture of CLIP ViT-L/14 at 336 pixels, one token each."""


def projector_of(
    form: str, facts: Facts, tensors: Mapping[str, Deferred]
) -> tuple[list[Part], dict[str, int], dict[str, str]]:
    """The connector that a LLaVA's projector becomes, the width of the features before it, and
    what a recipe must say.

    Args:
        form: where ``config.json`` speaks of it: ``mm`` (keys that begin with ``mm_``) or
            ``vision_config``.
        facts: the whole ``config.json``.
        tensors: all there are; without a projector among them there is no connector.

    Raises:
        ValueError: if it is of another kind.
    """
    if not any(name.startswith(_THEIRS) for name in tensors):
        return [], {}, {}
    if form == "mm":
        kind = text(facts, "mm_projector_type", "linear")
        features = size(facts, "mm_hidden_size")
    else:
        act = text(facts, "projector_hidden_act", "gelu")
        kind = "mlp2x_gelu" if act == "gelu" else f"mlp with {shown(act)}"
        vision = facts.get("vision_config")
        features = size(vision if isinstance(vision, dict) else {}, "hidden_size", 1024)
    if kind != "mlp2x_gelu":
        raise ValueError(f"its projector is {shown(kind)} in {CONFIG}, only mlp2x_gelu is known")
    tower = _tower()
    connector = ", ".join(
        f"{key}: {json.dumps(value)}" for key, value in tower["connector"].items()
    )
    return (
        [Part(FOLDER, "align", PROJECTOR, {"image": tower})],
        {"features": features},
        {
            "model.towers.image.connector": f"{{{connector}}}",
            "model.towers.image.frame_order": tower["frame_order"],
            "stage.connectors.image": f"FOLDER/{FOLDER}",
        },
    )


def _tower() -> dict[str, Any]:
    """The tower as far as a projector says it: its connector, and the average over frames.

    The encoder is not recorded: any whose features have the projector's width can be named.
    """
    connector = ConnectorConfig(
        name="mlp2x_gelu", input_norm=False, positions=False, stack=1, max_tokens=PATCHES
    )
    return {**asdict(TowerConfig(connector=connector, frame_order="average")), "encoder": {}}
