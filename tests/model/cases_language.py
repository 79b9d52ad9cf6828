"""Runs in one process of ``run_distributed``: our language model beside independent ones."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn

from data_pipeline.conversation.template import Rendered
from data_pipeline.reading.collate import MicroBatch, Sample, collate
from tests.model.reference import llama, mixtral, ours
from unimoe_mcore.checkpoints.pieces import sharded_tensors
from unimoe_mcore.config.model import LanguageConfig, LoRAConfig, ModelConfig, MoEConfig
from unimoe_mcore.config.parallel import ParallelConfig
from unimoe_mcore.config.recipe import Recipe
from unimoe_mcore.config.stage import StageConfig
from unimoe_mcore.model.build import build_model
from unimoe_mcore.model.initialise import initialise
from unimoe_mcore.model.lora import merge_lora, targeted_linears
from unimoe_mcore.model.unimoe import UniMoEModel
from unimoe_mcore.runtime import groups
from unimoe_mcore.runtime.capabilities import detect, transformer_flags

LENGTHS = (9, 1, 14, 4)
EXPERTS = 5


def language(**changes: Any) -> LanguageConfig:
    shape = {"blocks": 4, "hidden": 32, "ffn": 40, "heads": 4, "kv_heads": 2, "vocabulary": 96}
    return LanguageConfig(**{**shape, "rope_base": 500, **changes})


def built(
    shape: LanguageConfig,
    placement: str = "",
    lora: LoRAConfig | None = None,
    experts: int = EXPERTS,
    **moe: Any,
) -> UniMoEModel:
    """Our model without towers; dense without a ``placement``."""
    recipe = Recipe(
        stage=StageConfig(
            kind="moe" if placement else "base",
            experts=["base"] * experts if placement else [],
            lora=lora or LoRAConfig(),
        ),
        model=ModelConfig(shape, MoEConfig(placement=placement or "interval", **moe)),
    )
    collection = ProcessGroupCollection.use_mpu_process_groups()
    return build_model(recipe, collection, {}, torch.float32, transformer_flags(detect()))


def fill(model: UniMoEModel, weights: dict[str, Tensor]) -> None:
    """Copy weights by name; every one of the model's that is no adapter must be among them."""
    parameters = {
        name: parameter
        for name, parameter in model.language_model.named_parameters()
        if ".lora_" not in name
    }
    assert parameters.keys() == weights.keys(), parameters.keys() ^ weights.keys()
    with torch.no_grad():
        for name, parameter in parameters.items():
            assert parameter.shape == weights[name].shape, name
            parameter.copy_(weights[name])


def batch_of(vocabulary: int) -> MicroBatch:
    """A packed row of sequences of ``LENGTHS`` and some padding, learnt but for a few tokens."""
    generator = torch.Generator().manual_seed(1)
    samples = []
    for number, length in enumerate(LENGTHS):
        ids = torch.randint(vocabulary, (length,), generator=generator).tolist()
        learn = [place >= number for place in range(length)]
        samples.append(Sample(str(number), "x", "text", Rendered(ids, learn)))
    return collate(samples, pad_id=0, multiple=16)


def reference(model: nn.Module, batch: MicroBatch) -> tuple[list[Tensor], Tensor]:
    """Logits of every sequence alone, and the loss: the sum over the learnt tokens."""
    logits, total = [], torch.zeros(())
    for sample in batch.samples:
        ids = torch.tensor(sample.tokens.ids)
        out = model(input_ids=ids[None]).logits[0]
        learn = torch.tensor(sample.tokens.learn[1:], dtype=torch.bool)
        if learn.any():
            total = total + F.cross_entropy(out[:-1][learn], ids[1:][learn], reduction="sum")
        logits.append(out)
    return logits, total


def difference(theirs: nn.Module, model: UniMoEModel, shape: LanguageConfig) -> dict[str, float]:
    """Largest differences of logits, loss and gradients, relative to the largest of theirs."""
    batch = batch_of(shape.vocabulary)
    expected, total = reference(theirs, batch)
    total.backward()
    losses = model(batch)
    (losses * batch.loss_mask).sum().backward()
    places = model.answer_places(batch)  # where there are logits; before the padding, in order
    assert len(places) == batch.label_tokens == 8 + 12 + 1
    logits = model(batch, with_loss=False)[0]
    gradients = {
        name: parameter.grad
        for name, parameter in theirs.named_parameters()
        if parameter.grad is not None
    }
    assert len(gradients) == len(list(theirs.parameters()))
    wanted = ours(gradients, shape)
    mine = {name: p.grad for name, p in model.language_model.named_parameters()}
    whole = torch.cat(expected)[places]
    return {
        "logits": relative(logits, whole),
        "loss": relative((losses * batch.loss_mask).sum(), total),
        "gradients": max(relative(mine[name], wanted[name]) for name in mine),
        "size": whole.abs().max().item(),
    }


def relative(mine: Tensor | None, theirs: Tensor) -> float:
    assert mine is not None
    return ((mine - theirs).abs().max() / theirs.abs().max()).item()


def dense(**changes: Any) -> dict[str, float]:
    shape = language(**changes)
    theirs, model = llama(shape), built(shape)
    fill(model, ours(dict(theirs.named_parameters()), shape))
    return difference(theirs, model, shape)


def sparse(
    placement: str, dense_blocks: list[int], experts: int = EXPERTS, **changes: Any
) -> dict[str, float]:
    shape = language(**changes)
    theirs = mixtral(shape, experts, dense_blocks)
    model = built(shape, placement, experts=experts)
    fill(model, ours(dict(theirs.named_parameters()), shape))
    return difference(theirs, model, shape)


def one_expert() -> dict[str, Any]:
    """One expert in every block, which all tokens must go to: the dense model.

    Also a step of the optimizer: nothing that is not finite, and a router that stays as it is.
    """
    shape = language()
    theirs = llama(shape)
    model = built(shape, "all", experts=1, top_k=1, score="pre_softmax")
    weights = {
        name.replace(".mlp.", ".mlp.experts.local_experts.0."): weight
        for name, weight in ours(dict(theirs.named_parameters()), shape).items()
    }
    names = [name for name, _ in model.language_model.named_parameters()]
    routers = {name: torch.ones(1, shape.hidden) for name in names if "router" in name}
    fill(model, weights | routers)
    batch = batch_of(shape.vocabulary)
    expected, total = reference(theirs, batch)
    losses = model(batch)
    (losses * batch.loss_mask).sum().backward()
    logits = model(batch, with_loss=False)[0]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    optimizer.step()
    after = dict(model.language_model.named_parameters())
    return {
        "routers": len(routers),
        "logits": relative(logits, torch.cat(expected)[model.answer_places(batch)]),
        "loss": relative((losses * batch.loss_mask).sum(), total),
        "routers stay": all(torch.equal(after[n], value) for n, value in routers.items()),
        "all else moves": all(not torch.equal(after[n], value) for n, value in weights.items()),
        "finite": all(bool(p.isfinite().all()) for p in after.values()),
    }


@torch.no_grad()
def adapted(placement: str, targets: list[str]) -> dict[str, Any]:
    """A model with adapters: as built, with random ``B``, and a plain one with merged weights."""
    shape, lora = language(), LoRAConfig(targets=targets, rank=3, alpha=6)
    batch = batch_of(shape.vocabulary)
    theirs = mixtral(shape, EXPERTS, [1, 3]) if placement else llama(shape)
    weights = ours(dict(theirs.named_parameters()), shape)
    plain, model = built(shape, placement), built(shape, placement, lora)
    for each in (plain, model):
        fill(each, weights)
    for tensor in sharded_tensors(model.sharded_state_dict()):
        if ".lora_" in tensor.key:  # as a stage begins
            initialise(tensor, 0, shape)
    generator = torch.Generator().manual_seed(2)
    layers = dict(targeted_linears(model.language_model, targets))
    for layer in layers.values():
        layer.lora_a.weight.normal_(generator=generator)
    base = plain(batch, with_loss=False)
    untrained = model(batch, with_loss=False)
    for layer in layers.values():
        layer.lora_b.weight.normal_(std=0.05, generator=generator)
    trained = model(batch, with_loss=False)

    merged = merge_lora(model.language_model)
    formula = {
        name: layer.weight + 6 / 3 * (layer.lora_b.weight @ layer.lora_a.weight)
        for name, layer in layers.items()
    }
    fill(plain, weights | {f"{name}.weight": value for name, value in formula.items()})
    return {
        "layers": sorted(merged),
        "unchanged": torch.equal(base, untrained),
        "change": relative(trained, base),
        "adapters against merged weights": relative(trained, plain(batch, with_loss=False)),
        "merged against the formula": max(relative(merged[n], formula[n]) for n in formula),
    }


def all_cases() -> dict[str, Any]:
    """Every comparison, by name."""
    groups.initialise(ParallelConfig())
    return {
        "dense": dense(),
        "dense untied": dense(tied=False),
        "dense one group": dense(kv_heads=1),
        "dense multi-head": dense(kv_heads=4, rope_base=10000),
        "all": sparse("all", []),
        "all, eight experts": sparse("all", [], experts=8),
        "one expert": one_expert(),
        "interval": sparse("interval", [1, 3]),
        "first_half": sparse("first_half", [2, 3]),
        "second_half": sparse("second_half", [0, 1]),
        "lora of stage 2": adapted("", ["mlp"]),
        "lora of stage 3": adapted("interval", ["attention", "mlp", "experts"]),
    }
