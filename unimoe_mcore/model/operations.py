"""Floating-point operations that a step needs: matrix products, one multiplication and one addition
each.

Needed is what the step's result depends on: no weight gradient for frozen weights, no gradient
towards what nothing trained lies behind, attention within each sequence and to earlier tokens only,
the experts that a token goes to, logits only where a label counts. What a layout or a saving of
memory repeats is not needed. Norms, activations and softmax are left out, as is usual.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import nn

from unimoe_mcore.config.model import LoRAConfig, ModelConfig, moe_blocks


@dataclass(frozen=True)
class Operations:
    """Operations of the forward and of the backward pass."""

    forward: int = 0
    backward: int = 0

    def __add__(self, other: Operations) -> Operations:
        return Operations(self.forward + other.forward, self.backward + other.backward)

    def times(self, number: int) -> Operations:
        """The same work ``number`` times."""
        return Operations(self.forward * number, self.backward * number)

    @property
    def total(self) -> int:
        """Both passes."""
        return self.forward + self.backward


def product(rows: int, inputs: int, outputs: int, towards: bool, trained: bool) -> Operations:
    """A linear layer on ``rows`` vectors.

    Args:
        towards: whether the gradient of its input is needed.
        trained: whether that of its weight is.
    """
    once = 2 * rows * inputs * outputs
    return Operations(once, once * (towards + trained))


def linear(rows: int, layer: nn.Module, towards: bool, trained: bool) -> Operations:
    """The same for an ``nn.Linear``."""
    outputs, inputs = layer.weight.shape  # type: ignore[misc]
    return product(rows, int(inputs), int(outputs), towards, trained)


def scores(pairs: int, width: int, towards: bool) -> Operations:
    """Attention's two products for ``pairs`` of places that see each other.

    Args:
        width: of all heads together.
        towards: whether gradients of query, key and value are needed.
    """
    once = 2 * 2 * pairs * width
    return Operations(once, 2 * once * towards)


@dataclass(frozen=True)
class Rows:
    """What the work of the language model depends on, summed over any micro-batches.

    Attributes:
        tokens: without padding.
        pairs: of tokens of one sequence of which one sees the other.
        places: whose logits are needed.
    """

    tokens: int
    pairs: int
    places: int


def needed_rows(lengths: Collection[int], labels: int) -> Rows:
    """The work of sequences of these lengths, with ``labels`` places whose label counts."""
    pairs = sum(n * (n + 1) // 2 for n in lengths)
    return Rows(sum(lengths), pairs, labels)


@dataclass(frozen=True)
class _Linear:
    """A kind of linear layer of the language model: whether it trains, its adapter's rank or 0."""

    trained: bool
    rank: int

    def run(self, rows: int, inputs: int, outputs: int, towards: bool) -> Operations:
        done = product(rows, inputs, outputs, towards, self.trained)
        if self.rank:
            done += product(rows, inputs, self.rank, towards, trained=True)
            done += product(rows, self.rank, outputs, towards=True, trained=True)
        return done

    @property
    def learns(self) -> bool:
        return self.trained or self.rank > 0


def language_operations(
    model: ModelConfig,
    experts: int,
    train: Collection[str],
    lora: LoRAConfig,
    rows: Rows,
    shared: bool = False,
) -> Operations:
    """The language model's share of a step, over all of its layers and in any layout.

    Args:
        experts: experts per MoE block; 0 for a dense model.
        train: parts that train (``unimoe_mcore.model.parts``).
        lora: adapters; they train if ``train`` names ``lora``.
        shared: whether every token of an MoE block also passes an MLP of its own.
    """
    shape, tokens = model.language, rows.tokens
    heads = shape.hidden * (1 + 2 * shape.kv_heads / shape.heads)
    attention, dense, expert = (
        _Linear(part in train, lora.rank if part in lora.targets and "lora" in train else 0)
        for part in ("attention", "mlp", "experts")
    )
    always = _Linear("shared" in train, dense.rank)  # adapters on `mlp` are on it too
    norms, router = "norms" in train, "router" in train
    # Whether what trains lies below: the embeddings, or a tower whose tokens are among them.
    towers = any(part.startswith(("connector", "encoder")) for part in train)
    below = "embeddings" in train or towers
    sparse = set(moe_blocks(model.moe.placement, shape.blocks)) if experts else set()
    done = Operations()
    for block in range(shape.blocks):
        towards = below or norms
        done += attention.run(tokens, shape.hidden, int(heads), towards)
        towards = towards or attention.learns
        done += scores(rows.pairs, shape.hidden, towards)
        done += attention.run(tokens, shape.hidden, shape.hidden, towards)
        below = towards
        towards = below or norms
        kind, each = dense, tokens
        inner = towards
        if block in sparse:
            kind, each = expert, tokens * model.moe.top_k
            done += product(tokens, shape.hidden, experts, towards, router)
            inner = towards or router  # the router's weight is a factor of what is inside
        done += kind.run(each, shape.hidden, 2 * shape.ffn, towards)
        inner = inner or kind.learns
        done += kind.run(each, shape.ffn, shape.hidden, inner)
        below = inner or kind.learns
        if block in sparse and shared:
            done += always.run(tokens, shape.hidden, 2 * shape.ffn, towards)
            done += always.run(tokens, shape.ffn, shape.hidden, towards or always.learns)
            below = below or always.learns
    trained = "embeddings" in train
    return done + product(rows.places, shape.hidden, shape.vocabulary, below or norms, trained)
