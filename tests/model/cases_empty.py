"""Runs inside the processes of ``run_distributed``: models built without memory, recomputation."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch

from tests.training.cases_stages import composed, few_steps
from unimoe_mcore.checkpoints.loading import load_sources
from unimoe_mcore.checkpoints.sources import find_sources
from unimoe_mcore.model import build, empty
from unimoe_mcore.runtime import groups
from unimoe_mcore.runtime.capabilities import detect, transformer_flags


def built(folder: str, recipe_name: str, extra: list[str], **options: Any) -> Any:
    """A loaded model of the tiny world and its groups' configuration."""
    recipe = composed(folder, recipe_name, *extra)
    collection = groups.initialise(recipe.parallel, seed=recipe.trainer.seed)
    markers = {"image": 290, "video": 291, "speech": 292, "audio": 293}
    kernels = transformer_flags(detect())
    model = build.build_model(recipe, collection, markers, torch.float32, kernels, **options)
    if options.get("memory", True):
        load_sources(model, find_sources(recipe), recipe)
    groups.destroy(keep_world=True)
    return model


def not_a_number(like: torch.Tensor, **keywords: Any) -> torch.Tensor:
    """Memory in which a weight that nobody fills is seen."""
    return torch.full_like(like, torch.nan, **keywords)


def as_before(folder: str, cases: dict[str, list[Any]]) -> dict[str, Any]:
    """What differs between a model built without memory and one that Megatron initialised."""
    results = {}
    for name, (recipe, extra) in cases.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(empty.torch, "empty_like", not_a_number)
            new = built(folder, recipe, extra)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(build, "WithoutMemory", contextlib.nullcontext)
            old = built(folder, recipe, extra)
        ours, theirs = dict(new.named_parameters()), dict(old.named_parameters())
        rotary = [m.language_model.rotary_pos_emb.inv_freq for m in (new, old)]
        results[name] = {
            "names": list(ours) == list(theirs),
            "differing": [n for n in ours if not torch.equal(ours[n], theirs[n])],
            "marks": [n for n in ours if marks(ours[n]) != marks(theirs[n])],
            "buffers": [
                n
                for (n, a), (_, b) in zip(new.named_buffers(), old.named_buffers(), strict=True)
                if not torch.equal(a, b)
            ],
            "rotary": torch.equal(*rotary),
            "parameters": sum(p.numel() for p in ours.values()),
        }
    return results


def marks(parameter: torch.nn.Parameter) -> dict[str, Any]:
    """Megatron's marks on a parameter, its dtype and whether it trains."""
    return {
        **parameter.__dict__,
        "dtype": str(parameter.dtype),
        "device": str(parameter.device),
        "trained": parameter.requires_grad,
    }


def recomputations(folder: str, cases: dict[str, list[str]]) -> dict[str, Any]:
    """Loss and gradient norm of a few steps for every way of recomputing."""
    return {
        name: few_steps(folder, recipe, extra, steps=2) for name, (recipe, *extra) in cases.items()
    }
