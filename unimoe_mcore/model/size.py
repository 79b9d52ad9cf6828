"""How large a recipe's language model is: all of it, and what is at work on one token."""

from __future__ import annotations

from dataclasses import dataclass

from unimoe_mcore.config.model import LoRAConfig, moe_blocks
from unimoe_mcore.config.parallel import ParallelConfig
from unimoe_mcore.config.recipe import Recipe
from unimoe_mcore.model.memory import language_parameters


@dataclass(frozen=True)
class LanguageSize:
    """Parameters of a whole language model, without adapters; towers are not part of it.

    Attributes:
        total: all of them.
        active: those that one token passes: of every block's experts ``top_k``. Counted as in
            Table 1 of the paper, the whole embedding included.
        mixture: how the experts are placed, in words; empty for a dense model.
    """

    total: int
    active: int
    mixture: str = ""

    def words(self) -> str:
        """As one line for the log."""
        if not self.mixture:
            return f"language model: {_short(self.total)} parameters, dense"
        return (
            f"language model: {_short(self.total)} parameters, {_short(self.active)} of them at "
            f"work on a token ({self.mixture})"
        )


def language_size(recipe: Recipe) -> LanguageSize:
    """Count, in closed form, the language model that a recipe builds."""
    model, stage = recipe.model, recipe.stage
    experts = len(stage.experts) if stage.kind == "moe" else 0
    shared = bool(stage.shared_expert)
    counts = language_parameters(model, experts, LoRAConfig(), ParallelConfig(), 0, shared)
    total, blocks = sum(counts.values()), model.language.blocks
    if not experts:
        return LanguageSize(total, total)
    idle = counts["experts"] // experts * (experts - model.moe.top_k)
    sparse = len(moe_blocks(model.moe.placement, blocks))
    mixture = (
        f"{experts} expert{'s' * (experts > 1)}, top {model.moe.top_k}, "
        f"in {sparse} of {blocks} blocks: {model.moe.placement}"
    )
    return LanguageSize(total, total - idle, mixture)


def _short(count: int) -> str:
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.2f} M"
