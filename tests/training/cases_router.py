"""Runs inside the processes of ``run_distributed``: routers in real stages, in several layouts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from data_pipeline.reading.collate import GROUPS, MicroBatch
from tests.model.cases_router import units
from tests.training.cases_stages import composed, opened, resumed, run_stage, skewed
from unimoe_mcore.checkpoints.store import ShardReader
from unimoe_mcore.runtime import groups
from unimoe_mcore.runtime.devices import device
from unimoe_mcore.training import step as steps
from unimoe_mcore.training.stage import StageRun
from unimoe_mcore.training.step import train_step
from unimoe_mcore.training.warmup import held

COMMON = [
    "model.moe.placement=all",
    "model.moe.balance_coefficient=0.5",
    "model.moe.z_loss=0.25",
    "trainer.router_every=1",
    "trainer.evaluation.routing=false",
]
FORMS = ("official", "sequence", "global", "global_running")


def few_labels(batches: Sequence[MicroBatch]) -> list[MicroBatch]:
    """The same tokens with every tenth label only, at least one in the whole."""
    kept = []
    for batch in batches:
        places = batch.loss_mask[0].nonzero()[:, 0][::10]
        mask = torch.zeros_like(batch.loss_mask)
        mask[0, places] = 1.0
        kept.append(replace(batch, loss_mask=mask))
    return kept


def all_labels(batches: Sequence[MicroBatch]) -> list[MicroBatch]:
    """The same tokens with a label at every token that is no padding."""
    return [replace(b, loss_mask=(~b.padding_mask).float()) for b in batches]


def silent(iterator: Iterator[MicroBatch], model: Any) -> tuple[Tensor, Any]:
    """Megatron's forward step with a language-model loss of zero: what is left are the routers'."""
    batch = next(iterator).to(device())

    def loss(losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        return (losses * 0).sum(), batch.loss_mask.sum().int(), {}

    return model(batch), loss


def router_gradients(stage: StageRun, batches: Sequence[MicroBatch], step: int) -> list[Any]:
    """Gradient of every router from the routers' losses alone, as the optimizer would get it."""
    module = stage.module
    _, tokens, samples = steps._global_counts(module, batches)
    module.begin_step()
    module.routers.begin(step, batches, tokens, samples)
    steps.run_schedule(module, batches, silent, forward_only=False)
    mine = {
        block: router.weight.main_grad.double().tolist()
        for block, router in module.routers.routers.items()
    }
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, mine)
    found = {block: value for part in gathered for block, value in part.items()}
    return [found[block] for block in sorted(found)]


def layout_gradients(
    folder: str, extra: list[str], forms: list[str], deals: list[str], recompute: bool = False
) -> dict[str, Any]:
    """Routers' gradients of the second step in a layout, by form, dealing and labels; metrics.

    The first step has a learning rate of zero: it only counts the load that ``global`` refers to.
    """
    stage = opened(
        composed(folder, "stage3", "name=router", *COMMON, "model.moe.balance=global", *extra)
    )
    module, found = stage.module, {}
    if recompute:
        config = module.chunks[0].language_model.decoder.config
        config.recompute_granularity = "full"
        config.recompute_method, config.recompute_num_layers = "uniform", 1
    with stage.pool(stage.samples) as pool:
        feed = stage.feed(pool)
        module.recipe.trainer.lr = 0.0
        found["metrics"] = train_step(module, feed.read(0), 0).routing
        batches = {deal: skewed(stage, 1) if deal == "skewed" else feed.read(1) for deal in deals}
        for form in forms:
            module.recipe.model.moe.balance = form
            for deal in deals:
                for labels in (few_labels, all_labels):
                    name = f"{form} {deal} {labels.__name__}"
                    found[name] = router_gradients(stage, labels(batches[deal]), 1)
        if dist.get_world_size() == 1 and not recompute:
            found["naive"] = naive_gradients(stage, feed.read(1))
    dist.barrier()
    groups.destroy(keep_world=True)
    return found


def naive_gradients(stage: StageRun, batches: Sequence[MicroBatch]) -> dict[str, Any]:
    """The last router's gradients by the written formulas in fp64, token by token.

    Nothing is taken from the router but its input and its weight.
    """
    routers = stage.module.routers.routers
    router = routers[max(routers)]
    previous = router.previous_load.tolist()
    inputs: list[Tensor] = []
    hook = router.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()[:, 0]))
    stage.module.recipe.model.moe.balance = "none"
    router_gradients(stage, batches, 1)
    hook.remove()
    weight = router.weight.detach().double().requires_grad_()
    experts, top_k = len(weight), 2
    rows = []  # per micro-batch: (scores, choices, sample), tokens without padding
    for hidden, batch in zip(inputs, batches, strict=True):
        keep = ~batch.padding_mask[0]
        logits = hidden[keep].double() @ weight.T
        rows.append((logits, torch.softmax(logits, -1), batch.sample[0][keep].tolist()))
    tokens = sum(len(logits) for logits, _, _ in rows)
    samples = sum(len(batch.samples) for batch in batches)

    def top(scores: Tensor, k: int) -> list[int]:
        return sorted(range(experts), key=lambda e: -float(scores[e]))[:k]

    def dot(counts: Sequence[float], scores: Tensor) -> Tensor:
        total = sum(counts)
        return experts * sum(counts[e] / total * scores[e] for e in range(experts))  # type: ignore[return-value]

    losses = {form: torch.zeros((), dtype=torch.float64) for form in FORMS}
    running = [0] * experts
    for _, probs, owner in rows:
        firsts = [0] * experts
        by_sample: dict[int, list[int]] = {}
        for scores, sample in zip(probs, owner, strict=True):
            firsts[top(scores, 1)[0]] += 1
            for expert in top(scores, top_k):
                running[expert] += 1
                by_sample.setdefault(sample, [0] * experts)[expert] += 1
        for scores, sample in zip(probs, owner, strict=True):
            own = by_sample[sample]
            losses["official"] = losses["official"] + dot(firsts, scores) / tokens
            losses["sequence"] = losses["sequence"] + dot(own, scores) / (
                samples * sum(own) / top_k
            )
            losses["global"] = losses["global"] + dot(previous, scores) / tokens
            losses["global_running"] = losses["global_running"] + dot(running, scores) / tokens
    z = sum((torch.logsumexp(logits, -1) ** 2).sum() for logits, _, _ in rows) / tokens
    found = {}
    for form, loss in losses.items():
        (gradient,) = torch.autograd.grad(0.5 * loss + 0.25 * z, weight, retain_graph=True)
        found[form] = gradient.tolist()
    return found


def counted_by_hand(folder: str) -> dict[str, Any]:
    """Metrics of one step, and the same from the routing maps that the routers returned."""
    stage = opened(composed(folder, "stage3", "name=router", *COMMON, "parallel.expert=1"))
    maps: dict[int, list[Tensor]] = {}
    for block, router in stage.module.routers.routers.items():
        kept = maps.setdefault(block, [])
        router.register_forward_hook(lambda _, __, out, kept=kept: kept.append(out[1]))
    with stage.pool(stage.samples) as pool:
        batches = stage.feed(pool).read(0)
        stage.recipe.trainer.lr = 0.0
        metrics = train_step(stage.module, batches, 0).routing
    naive: dict[str, dict[str, Any]] = {}
    for block, kept in maps.items():
        counts: dict[str, list[int]] = {}
        for chosen, batch in zip(kept, batches, strict=True):
            for token, group in enumerate(batch.group[0].tolist()):
                if group >= 0:
                    row = counts.setdefault(GROUPS[group], [0] * 4)
                    for expert in chosen[token].nonzero()[:, 0].tolist():
                        row[expert] += 1
        naive[str(block)] = counts
    dist.barrier()
    groups.destroy(keep_world=True)
    return {"metrics": metrics, "naive": naive}


def warmed_up(folder: str) -> dict[str, Any]:
    """What moved in a warm-up of two steps and in the step after it; groups of parameters."""
    warm = [*COMMON, "model.moe.router_warmup=2", "trainer.weight_decay=0.5", "trainer.warmup=0"]
    stage = opened(composed(folder, "stage3", "name=router", *warm))
    module = stage.module
    stage.recipe.trainer.lr = 1e-2
    trained = {n: p for n, p in module.chunks[0].named_parameters() if p.requires_grad}
    moved: list[dict[str, bool]] = []

    def moments(name: str) -> float:
        """Largest of Adam's first moments of a parameter."""
        chain = getattr(module.optimizer, "chained_optimizers", [module.optimizer])
        states = [o.optimizer.state.get(trained[name]) for o in chain if o.optimizer is not None]
        return max(float(s["exp_avg"].abs().max()) for s in states if s)

    with stage.pool(stage.samples) as pool:
        feed = stage.feed(pool)
        for step in range(3):
            before = {name: p.detach().clone() for name, p in trained.items()}
            train_step(module, feed.read(step), step)
            changed = {n: not torch.equal(p, before[n]) for n, p in trained.items()}
            # B is zero at first, so that A has no gradient in the first step it may move in; with
            # weight decay it moves all the same.
            moved.append(
                {
                    "held": any(moves for n, moves in changed.items() if held(n)),
                    "all held": all(moves for n, moves in changed.items() if held(n)),
                    "others": all(moves for n, moves in changed.items() if not held(n)),
                    "moments": max(moments(n) for n in trained if held(n)) > 0,
                }
            )
    dist.barrier()
    groups.destroy(keep_world=True)
    return {"moved": moved, "held": sum(held(name) for name in trained)}


def remembered(folder: str) -> dict[str, Any]:
    """Resumed runs whose losses depend on what the routers remember of earlier steps."""
    forms = {
        "global": ["model.moe.balance=global", "model.moe.balance_coefficient=5"],
        "bias": ["model.moe.balance=bias", "model.moe.score=sigmoid", "model.moe.bias_rate=0.05"],
    }
    common = ["model.moe.placement=all", "trainer.evaluation.after=false"]
    return {name: resumed(folder, [*common, *extra], name) for name, extra in forms.items()}


def shared(folder: str) -> dict[str, Any]:
    """A run with a shared expert that trains, capacity and jitter; where that expert came from."""
    source = f"{folder}/runs/stage2-speech/gives"
    recipe = composed(
        folder,
        "stage3",
        "name=shared",
        *COMMON,
        f"stage.shared_expert={source}",
        "stage.train=[router, lora, shared, connectors]",
        "model.moe.capacity=0.5",
        "model.moe.jitter=0.1",
        "trainer.evaluation.after=false",
    )
    stage = opened(recipe)
    dense = ShardReader(Path(source), verify=False)
    loaded = {
        name: torch.equal(p, dense.read(name.replace(".shared_experts", "")))
        for name, p in stage.module.chunks[0].named_parameters()
        if ".shared_experts." in name and ".lora_" not in name
    }
    dist.barrier()
    groups.destroy(keep_world=True)
    metrics = run_stage(recipe)
    given = ShardReader(Path(folder) / "runs" / "shared" / "gives", verify=False)
    changed = {
        name: not torch.equal(given.read(name), dense.read(name.replace(".shared_experts", "")))
        for name in loaded
    }
    return {"loaded": loaded, "changed": changed, "metrics": metrics}


def alone(folder: str) -> dict[str, Any]:
    """One process: the reference of all layouts, accumulations, metrics."""
    one = partial(layout_gradients, folder, forms=list(FORMS), deals=["balanced"])
    return {
        "few rows": one(["parallel.expert=1", "data.tokens_per_microbatch=4096"]),
        "more rows": one(["parallel.expert=1", "data.tokens_per_microbatch=96"]),
        "recomputed": one(["parallel.expert=1", "data.tokens_per_microbatch=4096"], recompute=True),
        "counted": counted_by_hand(folder),
        "units": units(),
    }


def together(folder: str) -> dict[str, Any]:
    """Two processes: layouts, warm-up, resumes, a shared expert."""
    tensor = ["parallel.expert=1", "parallel.tensor=2", "parallel.sequence_parallel=true"]
    pipeline = ["parallel.expert=1", "parallel.pipeline=2"]
    forms = list(FORMS)
    return {
        "EP2": layout_gradients(folder, ["parallel.expert=2"], forms, ["balanced", "skewed"]),
        "TP2": layout_gradients(folder, tensor, forms, ["balanced"]),
        "PP2": layout_gradients(folder, pipeline, forms, ["balanced"]),
        "warm-up": warmed_up(folder),
        "remembered": remembered(folder),
        "shared": shared(folder),
    }
