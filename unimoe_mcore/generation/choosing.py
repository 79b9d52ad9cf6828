"""Which token comes next: the likeliest, or one drawn from the likely ones."""

from __future__ import annotations

import torch
from torch import Tensor

from unimoe_mcore.generation.sampling import Sampling


class Chooser:
    """Chooses the tokens of one answer."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._generator = torch.Generator().manual_seed(sampling.seed)

    def choose(self, logits: Tensor) -> int:
        """The next token.

        Args:
            logits: ``[vocabulary]`` fp32.
        """
        if not self._sampling.temperature:
            return int(logits.argmax())
        # On the CPU, so that a seed gives the same answer on any device.
        logits = logits.cpu().double() / self._sampling.temperature
        likely, order = torch.softmax(logits, 0).sort(descending=True, stable=True)
        before = likely.cumsum(0) - likely
        likely = likely.masked_fill(before >= self._sampling.top_p, 0.0)
        drawn = torch.multinomial(likely, 1, generator=self._generator)
        return int(order[drawn])
