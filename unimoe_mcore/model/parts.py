"""Named groups of parameters: what a recipe can train or freeze."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn

_LANGUAGE = {
    "embeddings": r"\.(embedding|output_layer)\.",
    "norms": r"norm\.weight$",
    "attention": r"\.self_attention\.linear_(qkv|proj)\.weight$",
    "mlp": r"\.mlp\.linear_fc[12]\.weight$",
    "router": r"\.mlp\.router\.",
    "experts": r"\.mlp\.experts\.local_experts\.\d+\.linear_fc[12]\.weight$",
    "shared": r"\.mlp\.shared_experts\.linear_fc[12]\.weight$",
    "lora": r"\.lora_[ab]\.",
}


def part_of(parameter: str) -> str:
    """The part that a parameter belongs to, by its name in the model.

    Raises:
        KeyError: if no part claims it.
    """
    tower = re.match(r"(?:module\.)*modality_submodules\.([^.]+)\.", parameter)
    if tower:
        return f"connector.{tower[1]}"
    for part, pattern in _LANGUAGE.items():
        if re.search(pattern, parameter):
            return part
    raise KeyError(f"no part claims the parameter {parameter}")


def train_only(model: nn.Module, parts: Sequence[str]) -> dict[str, int]:
    """Let the named parts train and freeze all others.

    Args:
        parts: names as ``part_of`` gives them; ``connectors`` means the connector of every tower.

    Returns:
        Trained parameters on this rank by part.
    """
    counts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        part = part_of(name)
        trained = part in parts or (part.startswith("connector.") and "connectors" in parts)
        parameter.requires_grad_(trained)
        if trained:
            counts[part] = counts.get(part, 0) + parameter.numel()
    return counts
