"""Megatron's optimizer from a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

from unimoe_mcore.config.recipe import Recipe
from unimoe_mcore.config.trainer import TrainerConfig


def build_optimizer(
    recipe: Recipe, wrapped: Sequence[DistributedDataParallel], dtype: torch.dtype
) -> Any:
    """The optimizer of all trained parameters of this rank's model chunks.

    Args:
        wrapped: the chunks.
        dtype: of weights and activations.
    """
    return get_megatron_optimizer(optimizer_config(recipe, dtype), list(wrapped))


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


def set_rates(optimizer: Any, trainer: TrainerConfig, lr: float) -> None:
    """Give every group of parameters the learning rate and the weight decay of a step."""
    for group in optimizer.param_groups:
        group["lr"] = lr
        # Megatron exempts biases and vectors by a multiplier that only its own scheduler reads.
        group["weight_decay"] = trainer.weight_decay * group.get("wd_mult", 1.0)
