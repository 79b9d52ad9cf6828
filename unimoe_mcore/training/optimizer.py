"""Megatron's optimizer from a recipe."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import (
    OptimizerConfig,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate

from unimoe_mcore.config.recipe import Recipe
from unimoe_mcore.config.stage import StageConfig, rate_of
from unimoe_mcore.model.parts import part_of
from unimoe_mcore.training.schedule import Rate
from unimoe_mcore.training.warmup import held_group

_RATE = "unimoe_rate"  # in a group of parameters: the key of ``stage.rates`` that it follows


def build_optimizer(
    recipe: Recipe, wrapped: Sequence[DistributedDataParallel], dtype: torch.dtype
) -> Any:
    """The optimizer of all trained parameters of this rank's model chunks.

    Args:
        wrapped: the chunks.
        dtype: of weights and activations.
    """
    config = optimizer_config(recipe, dtype)
    overrides = {
        **get_standard_config_overrides(config),
        **_overrides(recipe.stage),
        **held_group(recipe),
    }
    optimizer = get_megatron_optimizer(config, list(wrapped), config_overrides=overrides)
    refuse_bad_gradients(optimizer)
    return optimizer


def refuse_bad_gradients(optimizer: Any) -> None:
    """Stop the run before a gradient that is not finite reaches any weight.

    The norm that clipping needs says whether there is one, on all ranks at once: Megatron's own
    check (``check_for_nan_in_grad``) is one more pass over all gradients, and two waits for each
    buffer of them. Of what is the same on all tensor ranks the norm takes the first rank's.
    """
    measure = optimizer.get_grad_norm

    def get_grad_norm() -> float:
        norm = float(measure())
        if not math.isfinite(norm):
            raise RuntimeError(f"the gradient norm is {norm}; the step is not taken")
        return norm

    optimizer.get_grad_norm = get_grad_norm


def _overrides(stage: StageConfig) -> dict[ParamKey, Any]:
    """One group of parameters for every part with rates of its own, by Megatron's mechanism.

    Groups are made alike on all ranks, whichever parts they hold, with and without the
    distributed optimizer.
    """

    def follows(rate: str) -> ParamKey:
        return ParamKey(
            with_name_predicate=ParamWithNamePredicate(
                name=rate, fn=lambda _, name: rate_of(stage, part_of(name)) == rate
            )
        )

    return {follows(rate): {_RATE: rate} for rate in stage.rates}


def optimizer_config(recipe: Recipe, dtype: torch.dtype) -> OptimizerConfig:
    """AdamW with fp32 main weights."""
    trainer = recipe.trainer
    return OptimizerConfig(
        optimizer="adam",
        lr=trainer.lr,
        weight_decay=trainer.weight_decay,
        adam_beta1=trainer.betas[0],
        adam_beta2=trainer.betas[1],
        adam_eps=trainer.eps,
        clip_grad=trainer.clip,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=recipe.parallel.distributed_optimizer,
    )


def set_rates(optimizer: Any, rates: Mapping[str, Rate]) -> None:
    """Give every group of parameters the learning rate and the weight decay of a step.

    Args:
        rates: of ``unimoe_mcore.training.schedule``.
    """
    for group in optimizer.param_groups:
        rate = rates[group.get(_RATE, "")]
        group["lr"] = rate.lr
        # Megatron exempts biases and vectors by a multiplier that only its own scheduler reads.
        group["weight_decay"] = rate.weight_decay * group.get("wd_mult", 1.0)
