"""How many parameters and bytes a rank holds, in closed form from recipe and layout.

Counts weights, gradients and optimizer state; not activations, whose size follows from
``data.tokens_per_microbatch`` and ``trainer.recompute``, nor frozen encoders.
"""

from __future__ import annotations

from dataclasses import dataclass

from unimoe_mcore.config.model import LanguageConfig, LoRAConfig, ModelConfig, moe_blocks
from unimoe_mcore.config.parallel import ParallelConfig
from unimoe_mcore.config.recipe import Recipe

EXPERT_PARTS = ("experts", "lora.experts")
"""Parts whose gradients and optimizer state belong to the expert data-parallel group."""


def blocks_of_stage(blocks: int, parallel: ParallelConfig, stage: int) -> list[int]:
    """The blocks that a pipeline stage holds, over all of its virtual pieces."""
    each = blocks // (parallel.pipeline * parallel.virtual_pipeline)
    firsts = range(stage * each, blocks, parallel.pipeline * each)
    return [block for first in firsts for block in range(first, first + each)]


def language_parameters(
    model: ModelConfig,
    experts: int,
    lora: LoRAConfig,
    parallel: ParallelConfig,
    stage: int,
    shared: bool = False,
) -> dict[str, int]:
    """Parameters of the language model on any rank of a pipeline stage, by part.

    Adapters are divided by what they adapt: ``lora.attention``, ``lora.mlp``, ``lora.experts``.

    Args:
        experts: experts per MoE block; 0 for a dense model.
        stage: number of the pipeline stage.
        shared: whether every MoE block also has an MLP that all tokens pass.
    """
    shape = model.language
    mine = blocks_of_stage(shape.blocks, parallel, stage)
    placed = set(moe_blocks(model.moe.placement, shape.blocks)) if experts else set()
    sparse = sum(block in placed for block in mine)
    dense, last = len(mine) - sparse, stage == parallel.pipeline - 1
    copies = (stage == 0) + (last and not (shape.tied and parallel.pipeline == 1))
    local = experts // parallel.expert
    attention, mlp = _attention(shape), _mlp(shape)
    counts = {
        "embeddings": copies * shape.vocabulary * shape.hidden // parallel.tensor,
        "norms": (2 * len(mine) + last) * shape.hidden,
        "attention": len(mine) * sum(i * o for _, i, o in attention) // parallel.tensor,
        "mlp": dense * sum(i * o for _, i, o in mlp) // parallel.tensor,
        "router": sparse * experts * shape.hidden,
        "experts": sparse * local * sum(i * o for _, i, o in mlp) // parallel.expert_tensor,
        "shared": shared * sparse * sum(i * o for _, i, o in mlp) // parallel.tensor,
        "lora.attention": len(mine) * _adapters(attention, lora.rank, parallel.tensor),
        "lora.mlp": (dense + shared * sparse) * _adapters(mlp, lora.rank, parallel.tensor),
        "lora.experts": sparse * local * _adapters(mlp, lora.rank, parallel.expert_tensor),
    }
    wanted = {f"lora.{target}" for target in lora.targets}
    return {
        part: count
        for part, count in counts.items()
        if count and (not part.startswith("lora.") or part in wanted)
    }


def _attention(shape: LanguageConfig) -> list[tuple[str, int, int]]:
    """Kind (column- or row-parallel), inputs and outputs of the attention's linear layers."""
    fused = shape.hidden + 2 * shape.hidden * shape.kv_heads // shape.heads
    return [("column", shape.hidden, fused), ("row", shape.hidden, shape.hidden)]


def _mlp(shape: LanguageConfig) -> list[tuple[str, int, int]]:
    """The same of a gated MLP."""
    return [("column", shape.hidden, 2 * shape.ffn), ("row", shape.ffn, shape.hidden)]


def _adapters(linears: list[tuple[str, int, int]], rank: int, tensor: int) -> int:
    """Parameters of the adapters of some layers: the half at the undivided side is whole."""
    return sum(
        rank * (inputs + outputs // tensor if kind == "column" else inputs // tensor + outputs)
        for kind, inputs, outputs in linears
    )


@dataclass(frozen=True)
class RankMemory:
    """Bytes that a rank holds for as long as it trains.

    Attributes:
        weights: all parameters, in the number format of the run.
        gradients: of trained parameters, fp32.
        optimizer: fp32 main weights (where the weights are not fp32 themselves) and two moments.
    """

    weights: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer

    def words(self) -> str:
        """As one line for the log."""
        return (
            f"{self.total / 1e9:.2f} GB a rank before activations: weights "
            f"{self.weights / 1e9:.2f}, gradients {self.gradients / 1e9:.2f}, optimizer "
            f"{self.optimizer / 1e9:.2f}"
        )


def rank_memory(
    counts: dict[str, int],
    trained: dict[str, int],
    parallel: ParallelConfig,
    world: int,
    precision: str,
    distributed: bool = False,
) -> RankMemory:
    """Bytes of a rank.

    Args:
        counts: parameters by part.
        trained: those that train.
        world: number of ranks.
        precision: ``bf16`` or ``fp32``.
        distributed: whether the optimizer's state is divided over the data-parallel ranks; its
            share is then up to a rank's padding (Megatron pads its buffers) what is given here.
    """
    size, each = (2, 12) if precision == "bf16" else (4, 8)
    dense = world // (parallel.tensor * parallel.pipeline * parallel.context)
    expert = world // (parallel.expert * parallel.expert_tensor * parallel.pipeline)
    optimizer = 0
    for part, count in trained.items():
        ranks = expert if part in EXPERT_PARTS else dense
        optimizer += each * -(-count // ranks) if distributed else each * count
    return RankMemory(
        weights=size * sum(counts.values()),
        gradients=4 * sum(trained.values()),
        optimizer=optimizer,
    )


def recipe_memory(
    recipe: Recipe, connectors: dict[str, int], world: int, stage: int, precision: str
) -> RankMemory:
    """Bytes of a rank of a run.

    Args:
        connectors: parameters of the connectors on that rank, by tower.
        world: number of ranks.
        stage: its pipeline stage.
        precision: ``bf16`` or ``fp32``.
    """
    parallel, moe = recipe.parallel, recipe.stage.kind == "moe"
    experts = len(recipe.stage.experts) if moe else 0
    shared = bool(recipe.stage.shared_expert)
    counts = language_parameters(recipe.model, experts, recipe.stage.lora, parallel, stage, shared)
    counts |= {f"connector.{tower}": count for tower, count in connectors.items()}
    return rank_memory(
        counts,
        trained_counts(counts, recipe),
        parallel,
        world,
        precision,
        parallel.distributed_optimizer,
    )


def trained_counts(counts: dict[str, int], recipe: Recipe) -> dict[str, int]:
    """Those of the parts of ``counts`` that a recipe trains."""
    return {part: n for part, n in counts.items() if _trains(recipe.stage.train, part)}


def _trains(train: list[str], part: str) -> bool:
    kind = part.split(".")[0]  # of ``lora.experts`` and ``connector.speech``
    return part in train or {"connector": "connectors"}.get(kind, kind) in train


def checkpoint_bytes(trained: dict[str, int]) -> int:
    """Size of a checkpoint: trained parts and Adam's two moments, in fp32."""
    return 12 * sum(trained.values())
