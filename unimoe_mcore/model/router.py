"""Megatron's router with losses that are means over the global batch.

Megatron scales its own losses as if every token were a label and ranks held equally many, and its
global form is a running mean over micro-batches (router.py:526-633 of 0.19.2). A step's loss is
divided by the label tokens of the global batch before its gradients are computed
(``unimoe_mcore.training.step``): a loss over all its tokens is attached as it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from data_pipeline.reading.collate import GROUPS
from unimoe_mcore.config.model import BALANCING_LOSSES, MoEConfig
from unimoe_mcore.model.balance import (
    first_choices,
    moved_bias,
    pull,
    sequence_load,
    sequence_pull,
    shares,
)
from unimoe_mcore.model.marks import Marks, read_marks

if TYPE_CHECKING:
    from unimoe_mcore.model.unimoe import UniMoEModel

STATE = ("previous_load", "expert_bias")
"""Buffers that a step changes and a checkpoint must hold."""


@dataclass
class RouterStep:
    """The step that a rank's routers are in; one object that all of them share.

    Attributes:
        balance: coefficient of the balancing loss in this step.
        z_loss: coefficient of the z-loss.
        tokens: of the global batch, without padding.
        samples: of the global batch.
        row: most samples in a micro-batch of this rank.
        record: whether to count for the metrics.
    """

    balance: float
    z_loss: float
    tokens: int
    samples: int
    row: int
    record: bool


@dataclass
class Tally:
    """What a router counted since the step began, on this rank, on its device.

    Attributes:
        load: choices of tokens (not padding) before any are dropped, ``[groups, experts]`` int64;
            all of them in the first row if groups are not recorded.
        sums: fp64: entropy of the scores over tokens; balancing loss; z-loss; choices that were
            dropped; tokens sent to other ranks, padding included.
    """

    load: Tensor
    sums: Tensor

    SUMS = ("entropy", "balance", "z", "dropped", "sent")

    @classmethod
    def empty(cls, experts: int, device: torch.device) -> Tally:
        """Nothing counted yet."""
        return cls(
            torch.zeros(len(GROUPS), experts, dtype=torch.int64, device=device),
            torch.zeros(len(cls.SUMS), dtype=torch.float64, device=device),
        )


class _Attached(torch.autograd.Function):
    """Hands a tensor on, and in the backward pass gives a loss the gradient one."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, loss: Tensor) -> Tensor:
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, torch.ones((), dtype=torch.float32, device=gradient.device)


class BalancedRouter(TopKRouter):
    """Chooses experts as Megatron does, attaches our losses, and counts what it chose.

    Padding counts nowhere: not in losses, loads, nor capacities. Outside of a training step
    (``step`` is None, or evaluation) it only chooses.

    Attributes:
        step: set by whoever trains (``unimoe_mcore.training.routers``).
        tally: of the step so far.
        previous_load: with ``balance=global``: load of the whole step before, ``[experts]`` fp32.
        expert_bias: with ``balance=bias``: added to the scores that experts are chosen by, fp32.
    """

    def __init__(
        self,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
        is_mtp_layer: bool = False,
        *,
        moe: MoEConfig,
    ) -> None:
        super().__init__(config, pg_collection, is_mtp_layer)
        self.moe = moe
        self.step: RouterStep | None = None
        self.tally: Tally | None = None
        self.experts = int(config.num_moe_experts or 0)
        local = self.experts // pg_collection.ep.size()
        first = pg_collection.ep.rank() * local
        self.local_experts = slice(first, first + local)
        if moe.balance == "global":
            self.register_buffer("previous_load", torch.zeros(self.experts, dtype=torch.float32))
        if moe.balance == "bias":
            del self.expert_bias  # Megatron's own would be moved by its gradient finalisation
            self.register_buffer("expert_bias", torch.zeros(self.experts, dtype=torch.float32))

    def _maintain_float32_expert_bias(self) -> None:
        """Megatron's moment to bring back to fp32 what a bf16 model cast: before any use."""
        super()._maintain_float32_expert_bias()
        if self.moe.balance == "global":
            self.previous_load.data = self.previous_load.data.float()

    def apply_input_jitter(self, input: Tensor) -> Tensor:
        """Noise in training only; Megatron's would also be there in evaluation."""
        return super().apply_input_jitter(input) if self.training else input

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Choose experts.

        Args:
            logits: ``[tokens, 1, experts]``.
            padding_mask: ``[tokens, planes]`` (``unimoe_mcore.model.marks``).

        Returns:
            Weights of the chosen experts (0 elsewhere) and which they are,
            ``[tokens, experts]``.
        """
        logits = logits.view(-1, self.experts)
        probs, chosen = topk_routing_with_score_function(
            logits,
            self.topk,
            use_pre_softmax=self.config.moe_router_pre_softmax,
            score_function=self.score_function,
            expert_bias=self.expert_bias,
            fused=self.config.moe_router_fusion,
            router_replay=self.router_replay,
        )
        limited = self.moe.capacity > 0 and self.training
        # Recomputation runs a layer twice; only the second time with gradients.
        step = self.step if self.training and torch.is_grad_enabled() else None
        if step is not None and not self._counts_in(step):
            step = None
        if step is None and not limited:
            return probs, chosen
        marks = read_marks(padding_mask, len(logits), logits.device)
        wanted, kept = chosen & marks.valid[:, None], chosen
        if limited:
            kept = within_capacity(probs.detach(), wanted, self.topk, self.moe.capacity)
            probs = probs * kept
        if step is not None:
            probs = self._count(step, probs, logits, wanted, kept, marks)
        return probs, kept

    def _counts_in(self, step: RouterStep) -> bool:
        """Whether anything of the step's choices is wanted by anybody."""
        return step.record or step.z_loss > 0 or self.moe.balance != "none"

    def _count(
        self,
        step: RouterStep,
        probs: Tensor,
        logits: Tensor,
        wanted: Tensor,
        kept: Tensor,
        marks: Marks,
    ) -> Tensor:
        """Add to the tally and return the weights with the losses attached."""
        if self.tally is None:
            self.tally = Tally.empty(self.experts, logits.device)
        tally = self.tally
        if step.record:
            tally.load.index_add_(0, marks.group, wanted.long())
        else:
            tally.load[0] += wanted.sum(0)
        scores = self._scores(logits)
        loss = torch.zeros((), device=logits.device)
        if step.balance and self.moe.balance in BALANCING_LOSSES:
            weights = self._pull(step, scores.detach(), wanted, marks)
            balance = (scores * weights * marks.valid[:, None]).sum()
            loss = loss + step.balance * balance
            tally.sums[1] += balance.detach()
        if step.z_loss:
            z = (torch.logsumexp(logits.float(), -1).square() * marks.valid).sum() / step.tokens
            loss = loss + step.z_loss * z
            tally.sums[2] += z.detach()
        if step.record:
            self._record(tally, scores.detach(), wanted, kept, marks)
        return _Attached.apply(probs, loss) if loss.requires_grad else probs

    def _scores(self, logits: Tensor) -> Tensor:
        """Scores of all experts, ``[tokens, experts]`` fp32; they sum to one."""
        if self.score_function == "sigmoid":
            scores = torch.sigmoid(logits.float())
            return scores / (scores.sum(-1, keepdim=True) + 1e-20)
        return torch.softmax(logits, -1, dtype=torch.float32)

    def _pull(self, step: RouterStep, scores: Tensor, wanted: Tensor, marks: Marks) -> Tensor:
        """What the scores are multiplied by, ``[tokens or 1, experts]``."""
        if self.moe.balance == "official":
            load = _summed(first_choices(scores, marks.valid), self.tp_cp_group)
            return pull(shares(load), step.tokens)[None]
        if self.moe.balance == "sequence":
            rows = _summed(sequence_load(wanted, marks.sample, step.row), self.tp_cp_group)
            return sequence_pull(rows, self.topk, step.samples)[marks.sample]
        if self.moe.balance == "global":
            return pull(shares(self.previous_load), step.tokens)[None]
        self.running_load += _summed(wanted.sum(0), self.tp_dp_cp_group)
        return pull(shares(self.running_load), step.tokens)[None]

    def _record(
        self, tally: Tally, scores: Tensor, wanted: Tensor, kept: Tensor, marks: Marks
    ) -> None:
        tally.sums[0] += (torch.special.entr(scores).sum(-1) * marks.valid).sum()
        tally.sums[3] += (wanted & ~kept).sum()
        tally.sums[4] += kept.sum() - kept[:, self.local_experts].sum()

    def begin(self) -> None:
        """Forget what was counted; before the first micro-batch of a step."""
        self.tally = None
        if self.moe.balance == "global_running":
            self.running_load = torch.zeros(
                self.experts, dtype=torch.int64, device=self.weight.device
            )

    @torch.no_grad()
    def end(self, load: Tensor) -> None:
        """Take up the load of the whole step, ``[experts]``, summed over all ranks."""
        self._maintain_float32_expert_bias()
        if self.moe.balance == "global":
            self.previous_load.copy_(load)
        if self.moe.balance == "bias":
            self.expert_bias.copy_(moved_bias(self.expert_bias, load, self.moe.bias_rate))


def routers(chunks: Sequence[UniMoEModel]) -> Iterator[tuple[UniMoEModel, int, TopKRouter]]:
    """Every router of this rank, with its chunk and the number of its transformer block."""
    for chunk in chunks:
        for layer in chunk.language_model.decoder.layers:
            for module in layer.modules():
                if isinstance(module, TopKRouter):
                    yield chunk, (layer.layer_number - 1) // 2, module


def within_capacity(probs: Tensor, wanted: Tensor, top_k: int, factor: float) -> Tensor:
    """The choices that fit: every expert's most probable ones, ``[tokens, experts]`` bool.

    A capacity is ``factor`` times an expert's even share of the tokens without padding, rounded
    up (Switch 2021, eq. 3). Megatron's counts padding as tokens.

    Args:
        probs: weights of the choices, ``[tokens, experts]``.
        wanted: the choices, all False at padding.
    """
    tokens = wanted.any(-1).sum()
    capacity = torch.ceil(tokens * (top_k * factor / probs.shape[1]))
    order = probs.masked_fill(~wanted, -math.inf).argsort(dim=0, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        0, order, torch.arange(len(order), device=order.device)[:, None].expand_as(order)
    )
    return wanted & (rank < capacity)


def _summed(counts: Tensor, group: dist.ProcessGroup) -> Tensor:
    if group.size() > 1:
        dist.all_reduce(counts, group=group)
    return counts
