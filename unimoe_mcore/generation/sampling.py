"""How the tokens of an answer are chosen, as somebody who asks says it."""

from __future__ import annotations

import math
from dataclasses import dataclass

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
