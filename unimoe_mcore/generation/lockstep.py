"""Processes that share the experts of a model, of which the first one answers.

In every MoE layer tokens travel to the processes that hold their experts, so that all must run
through it together. The others run a row of one token of padding along; they hold no media and no
cache, and say nothing.
"""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core.inference.contexts import StaticInferenceContext
from torch import Tensor

from unimoe_mcore.model.unimoe import UniMoEModel
from unimoe_mcore.runtime.devices import device

STEP_TIMEOUT = timedelta(minutes=10)
"""How long processes wait for one another within a step, of which a layer is the longest part."""
_NEVER = timedelta(days=365)
"""How long they wait for the first one's word: it may wait for a person."""
_END, _STEP = 0, 1


class Lockstep:
    """The model as the first process runs it; making one is a collective, with ``run_along``.

    Attributes:
        broken: whether a step failed in this process while others are in it still. They cannot
            hear another word, so that this process must end, and they end with it.
    """

    def __init__(self, model: UniMoEModel) -> None:
        self._model = model
        self._word = _Word()
        self.broken = False

    def next_logits(self, hidden: Tensor, cache: StaticInferenceContext | None) -> Tensor:
        """``UniMoEModel.next_logits``, with all processes.

        Raises:
            RuntimeError: an earlier step broke.
        """
        if self.broken:
            raise RuntimeError("the other processes are in a step that failed here")
        self._word.say(_STEP)
        try:
            return self._model.next_logits(hidden, cache)
        except BaseException:
            self.broken = self._word.has_listeners
            raise

    def end(self) -> None:
        """Let the other processes end; not if a step broke, then this one's end is theirs."""
        if not self.broken:
            self._word.say(_END)


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
    word = _Word()
    while word.say() == _STEP:
        model.next_logits(hidden)


class _Word:
    """The first process's word, on connections of its own, which alone wait without end."""

    def __init__(self) -> None:
        self.has_listeners = dist.get_world_size() > 1
        self._group: dist.ProcessGroup | None = None
        if self.has_listeners:
            # Of the host: a GPU would be kept busy by waiting.
            group = dist.new_group(timeout=_NEVER, backend="gloo")
            assert isinstance(group, dist.ProcessGroup)
            self._group = group

    def say(self, what: int = _END) -> int:
        """What the first process says next; it waits for the others to hear it."""
        if self._group is None:
            return what
        word = torch.tensor([what])
        dist.broadcast(word, 0, group=self._group)
        return int(word)
