"""Processes that share the experts of a model, of which the first one answers.

In every MoE layer tokens travel to the processes that hold their experts, so that all must run
through it together. The others run a row of one token of padding along; they hold no media and no
cache, and say nothing.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core.inference.contexts import StaticInferenceContext
from torch import Tensor

from unimoe_mcore.model.unimoe import UniMoEModel
from unimoe_mcore.runtime.devices import device

_END, _STEP = 0, 1


class Lockstep:
    """The model as the first process runs it."""

    def __init__(self, model: UniMoEModel) -> None:
        self._model = model

    def next_logits(self, hidden: Tensor, cache: StaticInferenceContext | None) -> Tensor:
        """``UniMoEModel.next_logits``, with all processes."""
        _told(_STEP)
        return self._model.next_logits(hidden, cache)

    def end(self) -> None:
        """Let the other processes end."""
        _told(_END)


@torch.no_grad()
def run_along(model: UniMoEModel, pad: int) -> None:
    """Run with the first process until it ends.

    Encoders are given back: media are the first process's.

    Args:
        pad: token of padding.
    """
    for tower in model.modality_submodules.values():
        tower.features.release()
    row = torch.tensor([[pad]], device=device())
    hidden = model.get_text_embeddings(row, torch.zeros_like(row), {})[:, None]
    while _told() == _STEP:
        model.next_logits(hidden)


def _told(what: int = _END) -> int:
    """What the first process says next; it waits for the others to hear it."""
    if dist.get_world_size() == 1:
        return what
    word = torch.tensor([what], device=device())
    dist.broadcast(word, 0)
    return int(word)
