"""Named groups of parameters: what a recipe can train or freeze."""

from __future__ import annotations

import re

from torch import nn

from unimoe_mcore.config.stage import StageConfig, trains
from unimoe_mcore.model.names import canonical

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
    tower = re.match(r"(?:module\.)*modality_submodules\.([^.]+)\.(encoders\.)?", parameter)
    if tower:
        return f"{'encoder' if tower[2] else 'connector'}.{tower[1]}"
    name = canonical(parameter)
    for part, pattern in _LANGUAGE.items():
        if re.search(pattern, name):
            return part
    raise KeyError(f"no part claims the parameter {parameter}")


def train_only(model: nn.Module, stage: StageConfig) -> None:
    """Let the parts that a stage names train and freeze all others."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trains(stage, part_of(name)))
