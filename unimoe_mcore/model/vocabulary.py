"""Rows of the vocabulary that only fill it up: their logits are minus infinity.

A published model's rows are made more, so that tensor-parallel ranks share them evenly and the
media's markers have some. Rows of zeros would have logits of 0, which are not impossible.
"""

from __future__ import annotations

import math
from typing import Any

from megatron.core.models.hybrid.hybrid_model import HybridModel
from torch import Tensor, nn

from unimoe_mcore.config.model import LanguageConfig


def never_say_padding(model: HybridModel, language: LanguageConfig, rank: int, ranks: int) -> None:
    """Give the rows behind ``language.words`` no share of any probability.

    Args:
        model: on any pipeline stage; only the last has an output layer.
        rank: among the tensor-parallel ranks, which hold equal numbers of rows.
        ranks: their number.
    """
    own = language.vocabulary // ranks
    first = max(0, min(own, language.words - rank * own))
    if not model.post_process or first == own:
        return

    def hook(layer: nn.Module, arguments: Any, output: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
        logits, bias = output
        logits[..., first:] = -math.inf
        return logits, bias

    model.output_layer.register_forward_hook(hook)
