"""Which token comes next: the likeliest, or one drawn from the likely ones."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from unimoe_mcore.config.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        temperature: 0 always takes the likeliest; else logits are divided by it before one is
            drawn.
        top_p: only the likeliest tokens are drawn from, as many as have this probability together.
        seed: of the generator, which nothing else draws from.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def check(self) -> None:
        """Refuse values that mean nothing.

        Raises:
            UserError: naming the value.
        """
        if not (math.isfinite(self.temperature) and 0 <= self.temperature <= 100):
            raise UserError(f"A temperature of {self.temperature:g} is not between 0 and 100.")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top-p is {self.top_p:g}, it must be above 0 and at most 1.")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"The seed {self.seed} is not between 0 and 2^63 - 1.")


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
