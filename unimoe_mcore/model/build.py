"""From a recipe to a model on this rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from megatron.core.models.mimo import MimoModelConfig
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import ModuleSpec

from unimoe_mcore.config.recipe import Recipe
from unimoe_mcore.config.stage import trains
from unimoe_mcore.model.empty import WithoutMemory, materialise
from unimoe_mcore.model.initialise import seeded_by_name
from unimoe_mcore.model.language import language_spec, transformer_config
from unimoe_mcore.model.lora import add_lora
from unimoe_mcore.model.rotary import scale_rotary
from unimoe_mcore.model.towers.encoders import build_encoder
from unimoe_mcore.model.towers.feature_cache import FeatureCache
from unimoe_mcore.model.towers.live_encoder import LiveEncoder
from unimoe_mcore.model.towers.tower import Tower
from unimoe_mcore.model.unimoe import UniMoEModel
from unimoe_mcore.model.vocabulary import never_say_padding
from unimoe_mcore.runtime.devices import device


def expert_count(recipe: Recipe) -> int:
    """Experts per MoE block; 0 for the dense model of the stages before the last."""
    return len(recipe.stage.experts) if recipe.stage.kind == "moe" else 0


def build_model(
    recipe: Recipe,
    groups: ProcessGroupCollection,
    markers: dict[str, int],
    dtype: torch.dtype,
    kernels: dict[str, Any],
    vp_stage: int | None = None,
    memory: bool = True,
) -> UniMoEModel:
    """One model chunk: towers on the first pipeline stage, its share of the layers, LoRA.

    A ``base`` stage has no towers. Weights are not loaded here: connectors are initialised, the
    language model's memory is not (``unimoe_mcore.checkpoints.loading`` fills it).

    Args:
        markers: token id of each modality's marker.
        dtype: of weights and activations.
        kernels: whose modules, and fusion flags (``unimoe_mcore.runtime.capabilities``).
        vp_stage: virtual pipeline stage, or None.
        memory: without, the language model stays on the meta device: shapes only.
    """
    experts, parallel = expert_count(recipe), recipe.parallel
    adapted = recipe.stage.lora.targets
    config = transformer_config(
        recipe.model.language,
        recipe.model.moe,
        experts,
        parallel,
        dtype,
        kernels,
        shared=bool(recipe.stage.shared_expert),
        recompute=recipe.trainer.recompute,
        adapted=adapted,
    )
    virtual = vp_stage or 0
    first = groups.pp.rank() == 0 and virtual == 0
    language = language_spec(
        config,
        recipe.model.language,
        recipe.model.moe,
        experts,
        parallel,
        groups,
        pre_process=first,
        post_process=groups.pp.rank() == groups.pp.size() - 1
        and virtual == parallel.virtual_pipeline - 1,
        vp_stage=vp_stage,
        adapted=adapted,
    )
    towers = _towers(recipe, groups) if first and recipe.stage.kind != "base" else {}
    with WithoutMemory():
        model = UniMoEModel(
            MimoModelConfig(
                language_model_spec=language,
                modality_submodules_spec=towers,
                special_token_ids=markers,
            ),
            groups,
        )
        _check_layers(model, config.num_layers, groups, parallel.virtual_pipeline)
        scale_rotary(model.language_model, recipe.model.language)
        never_say_padding(
            model.language_model, recipe.model.language, groups.tp.rank(), groups.tp.size()
        )
        if adapted:
            add_lora(model.language_model, recipe.stage.lora)
    if not memory:
        return model
    materialise(model, device(), dtype)
    return model.to(device(), dtype)


def _towers(recipe: Recipe, groups: ProcessGroupCollection) -> dict[str, ModuleSpec]:
    """The towers, built with memory, in the form in which ``MimoModel`` asks for them."""
    built = {name: _tower(recipe, name, groups) for name in recipe.model.towers}
    return {
        name: ModuleSpec(module=_BuiltTower, params={"tower": tower})
        for name, tower in built.items()
    }


def _tower(recipe: Recipe, name: str, groups: ProcessGroupCollection) -> Tower:
    config = recipe.model.towers[name]
    features = _features(recipe, name)
    with seeded_by_name(recipe.trainer.seed, f"connector.{name}"):
        return Tower(name, config, features, recipe.model.language.hidden, groups)


class _BuiltTower:
    """What ``MimoModel`` calls to make a tower from its spec: hands out the one that there is."""

    @staticmethod
    def from_spec(spec: ModuleSpec, **_: bool) -> Tower:
        tower: Tower = spec.params["tower"]
        return tower


def _features(recipe: Recipe, tower: str) -> FeatureCache | LiveEncoder:
    """Where a tower's features come from: the disk, or its encoder if that trains."""
    encoder = build_encoder(recipe.model.towers[tower].encoder)
    if trains(recipe.stage, f"encoder.{tower}"):
        return LiveEncoder(encoder)
    return FeatureCache(Path(recipe.paths.cache) / "features", encoder)


def _check_layers(
    model: UniMoEModel, layers: int, groups: ProcessGroupCollection, virtual: int
) -> None:
    """Refuse a model of which a pipeline pattern left layers out (Megatron says nothing)."""
    built = len(model.language_model.decoder.layers)
    if built * groups.pp.size() * virtual != layers:
        raise RuntimeError(
            f"this stage has {built} layers, {groups.pp.size()} x {virtual} stages make "
            f"{built * groups.pp.size() * virtual}, but the model has {layers}"
        )
