"""What samples of a recipe cost, counted from its sizes."""

from __future__ import annotations

from pathlib import Path

from data_pipeline.modalities import tower_modalities
from data_pipeline.planning.cost import CostModel
from unimoe_mcore.config.model import moe_blocks
from unimoe_mcore.config.recipe import Recipe
from unimoe_mcore.config.towers import FEATURES_PER_SECOND, EncoderConfig


def costs_of(recipe: Recipe) -> CostModel:
    """The costs that a run deals by: measured ones if the recipe names a file, else estimated.

    Raises:
        DataError: the file cannot be read.
    """
    if recipe.data.costs != "estimate":
        return CostModel.load(Path(recipe.data.costs))
    return estimated_costs(recipe)


def estimated_costs(recipe: Recipe) -> CostModel:
    """Operations, forward and backward, per token, per token squared, and per unit of media.

    A matrix of ``n`` parameters costs ``2 n`` operations a token forward and, towards its input,
    backward; as much again where it is trained. Frozen encoders run forward only.
    """
    language = recipe.model.language
    attention = language.hidden * language.hidden * (2 + 2 * language.kv_heads / language.heads)
    mlp = 3 * language.hidden * language.ffn
    active = language.blocks * (attention + mlp)
    if recipe.stage.kind == "moe":
        sparse = len(moe_blocks(recipe.model.moe.placement, language.blocks))
        extra = recipe.model.moe.top_k - 1 + bool(recipe.stage.shared_expert)
        active += sparse * extra * mlp
    passes = 6 if recipe.stage.kind == "base" else 4
    # Scores and their use: 2 * 2 * hidden per pair of tokens, half of them masked, three passes.
    quadratic = language.blocks * 6 * language.hidden
    encoder = {
        modality: _operations(tower.encoder)
        for name, tower in recipe.model.towers.items()
        for modality in tower_modalities(name)
    }
    return CostModel(passes * active, quadratic, encoder, "operations counted from the recipe")


def _operations(encoder: EncoderConfig) -> float:
    """Operations of a known encoder for one picture, frame, or second of sound; 0 of others.

    EfficientNet-Lite0: 407 million multiplications at 224 pixels (its authors' table). Whisper
    tiny: 4 layers of ``12 * 384**2`` parameters at 50 places a second, and attention over them.
    """
    if encoder.name == "efficientnet_lite0":
        return 2 * 407e6 * (encoder.resolution / 224) ** 2
    if encoder.name.startswith("whisper"):
        return FEATURES_PER_SECOND * 4 * 2 * 12 * 384**2
    return 0.0
