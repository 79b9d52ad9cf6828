"""Runs in one process of ``run_distributed``: a router alone, beside loops over tokens."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import get_updated_expert_bias
from torch import Tensor

from data_pipeline.reading.collate import MicroBatch
from tests.model.cases_language import batch_of, language
from unimoe_mcore.config.model import ModelConfig, MoEConfig
from unimoe_mcore.config.parallel import ParallelConfig
from unimoe_mcore.config.recipe import Recipe
from unimoe_mcore.config.stage import StageConfig
from unimoe_mcore.model.build import build_model
from unimoe_mcore.model.language import transformer_config
from unimoe_mcore.model.marks import read_marks, token_marks
from unimoe_mcore.model.router import BalancedRouter, RouterStep
from unimoe_mcore.runtime import groups
from unimoe_mcore.runtime.capabilities import detect, transformer_flags

EXPERTS, TOKENS, PADDING = 6, 40, 7


def router(**options: Any) -> BalancedRouter:
    """A router with weights large enough for clear choices."""
    moe = MoEConfig(**options)
    config = transformer_config(
        language(), moe, EXPERTS, ParallelConfig(), torch.float32, transformer_flags(detect())
    )
    made = BalancedRouter(config, ProcessGroupCollection.use_mpu_process_groups(), moe=moe)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        made.weight.copy_(torch.randn(made.weight.shape, generator=generator) * 0.3)
    return made


def inputs() -> tuple[Tensor, Tensor]:
    """Hidden states ``[tokens, 1, hidden]``, and a padding mask ``[tokens, 1]``."""
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(TOKENS, 1, language().hidden, generator=generator)
    mask = torch.zeros(TOKENS, 1, dtype=torch.bool)
    mask[-PADDING:] = True
    return hidden, mask


def by_hand(weight: Tensor, hidden: Tensor, score: str, top_k: int, bias: list[float]) -> Tensor:
    """Weights of the chosen experts by the formulas, token by token, in fp64."""
    result = torch.zeros(len(hidden), EXPERTS, dtype=torch.float64)
    for token, state in enumerate(hidden[:, 0].double()):
        logits = (weight.double() @ state).tolist()
        if score == "sigmoid":
            scores = [1 / (1 + math.exp(-x)) for x in logits]
        else:
            total = sum(math.exp(x) for x in logits)
            scores = [math.exp(x) / total for x in logits]
        order = sorted(range(EXPERTS), key=lambda e: -(scores[e] + bias[e]))[:top_k]
        whole = 1.0 if score == "pre_softmax" else sum(scores[e] for e in order)
        for expert in order:
            result[token, expert] = scores[expert] / whole
    return result


def scores() -> dict[str, float]:
    """Largest difference of every way to score from the loop."""
    hidden, mask = inputs()
    found = {}
    for name, score, top_k, bias in (
        ("softmax", "softmax", 2, [0.0] * EXPERTS),
        ("pre_softmax", "pre_softmax", 3, [0.0] * EXPERTS),
        ("pre_softmax of one", "pre_softmax", 1, [0.0] * EXPERTS),
        ("sigmoid", "sigmoid", 2, [0.0] * EXPERTS),
        ("bias", "sigmoid", 2, [0.3, -0.3, 0.0, 0.2, 0.0, -0.1]),
    ):
        made = router(score=score, top_k=top_k, balance="bias" if name == "bias" else "none")
        if name == "bias":
            made.expert_bias.copy_(torch.tensor(bias))
        probs, chosen = made(hidden, mask)
        wanted = by_hand(made.weight.detach(), hidden, score, top_k, bias)
        assert torch.equal(chosen, wanted > 0), name
        found[name] = (probs - wanted).abs().max().item()
    return found


def capacity() -> dict[str, Any]:
    """Choices under a capacity, in training and in evaluation, and by hand."""
    hidden, mask = inputs()
    plain, limited = router(), router(capacity=0.8)
    everything, _ = plain(hidden, mask)
    limited.train()
    probs, kept = limited(hidden, mask)
    limited.eval()
    _, judged = limited(hidden, mask)
    most = math.ceil(0.8 * 2 * (TOKENS - PADDING) / EXPERTS)
    wanted = torch.zeros_like(kept)
    for expert in range(EXPERTS):
        column = everything[: TOKENS - PADDING, expert].tolist()
        taken = [t for t in sorted(range(len(column)), key=lambda t: -column[t]) if column[t] > 0]
        wanted[taken[:most], expert] = True
    return {
        "as by hand": torch.equal(kept, wanted),
        "dropped": int((everything[: TOKENS - PADDING] > 0).sum() - kept.sum()),
        "weights": torch.equal(probs, everything * wanted),
        "evaluation": torch.equal(judged, everything > 0),
    }


def jitter() -> dict[str, bool]:
    """Whether noise is there in training only, and only if asked for."""
    hidden, mask = inputs()
    noisy, plain = router(jitter=0.2), router()

    def seeded(made: BalancedRouter, seed: int, train: bool) -> Tensor:
        torch.manual_seed(seed)
        result: Tensor = made.train(train)(hidden, mask)[0]
        return result

    quiet = seeded(plain, 0, True)
    return {
        "off": torch.equal(quiet, seeded(plain, 1, True)),
        "evaluation": torch.equal(quiet, seeded(noisy, 0, False)),
        "repeats": torch.equal(seeded(noisy, 0, True), seeded(noisy, 0, True)),
        "differs": not torch.equal(seeded(noisy, 0, True), seeded(noisy, 1, True)),
        "is there": not torch.equal(quiet, seeded(noisy, 0, True)),
    }


def bias() -> dict[str, Any]:
    """Biases after two steps, ours and by Megatron's own function; padding in no load."""
    hidden, mask = inputs()
    made = router(balance="bias", score="sigmoid", bias_rate=0.07)
    made.step = RouterStep(0.0, 0.0, TOKENS, 1, 1, record=False)
    theirs = torch.zeros(EXPERTS)
    group = ProcessGroupCollection.use_mpu_process_groups().tp_dp_cp
    same = []
    for _ in range(2):
        made.begin()
        _, chosen = made(hidden, mask)
        counted = chosen[: TOKENS - PADDING].sum(0)
        assert made.tally is not None
        same.append(torch.equal(made.tally.load.sum(0), counted))
        made.end(made.tally.load.sum(0))
        theirs = get_updated_expert_bias(counted.float(), theirs, 0.07, group)
    return {
        "loads": same,
        "difference": (made.expert_bias - theirs).abs().max().item(),
        "moved": made.expert_bias.abs().max().item(),
    }


def marks() -> bool:
    """Whether a router reads from the planes what was written, padding included."""
    batch: MicroBatch = batch_of(96)
    planes = token_marks(batch, detailed=True)
    read = read_marks(planes.T, planes.shape[1], planes.device)
    valid = ~batch.padding_mask[0]
    plain = read_marks(token_marks(batch, detailed=False).T, planes.shape[1], planes.device)
    return (
        torch.equal(read.valid, valid)
        and torch.equal(plain.valid, valid)
        and torch.equal(read.sample[valid], batch.sample[0][valid])
        and torch.equal(read.group[valid], batch.group[0][valid])
        and int(read.sample.max()) == len(batch.samples) - 1
    )


@torch.no_grad()
def shared_expert() -> float:
    """What a shared expert adds to its layer's output beside the MLP by hand; relative."""
    recipe = Recipe(
        stage=StageConfig(kind="moe", experts=["base"] * EXPERTS, shared_expert="base"),
        model=ModelConfig(language(), MoEConfig()),
    )
    collection = ProcessGroupCollection.use_mpu_process_groups()
    model = build_model(recipe, collection, {}, torch.float32, transformer_flags(detect()))
    for parameter in model.parameters():  # a model comes without values
        torch.nn.init.normal_(parameter, std=0.02)
    layer = next(module for module in model.modules() if isinstance(module, MoELayer))
    hidden, mask = inputs()
    both = layer(hidden, padding_mask=mask.T)[0]
    extra: Any = layer.shared_experts
    gate, up = (hidden @ extra.linear_fc1.weight.T).chunk(2, -1)
    wanted = (F.silu(gate) * up) @ extra.linear_fc2.weight.T
    extra.linear_fc2.weight.zero_()
    added = both - layer(hidden, padding_mask=mask.T)[0]
    return ((added - wanted).abs().max() / wanted.abs().max()).item()


def units() -> dict[str, Any]:
    """Every comparison, by name."""
    groups.initialise(ParallelConfig())
    found = {
        "scores": scores(),
        "capacity": capacity(),
        "jitter": jitter(),
        "bias": bias(),
        "marks": marks(),
        "shared expert": shared_expert(),
    }
    groups.destroy(keep_world=True)
    return found
