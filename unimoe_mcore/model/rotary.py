"""Rotary positions that are stretched, for sequences longer than a model was first trained on."""

from __future__ import annotations

from megatron.core.models.hybrid.hybrid_model import HybridModel

from unimoe_mcore.config.model import LanguageConfig


def scale_rotary(model: HybridModel, language: LanguageConfig) -> None:
    """Scale the frequencies ``[head / 2]`` of a model as ``language.rope_scaling`` says.

    ``linear`` divides all of them by the factor (Chen et al. 2023, section 3.2). ``llama3`` divides
    the slow ones, leaves the fast ones, and blends in between (Llama 3.1; the arithmetic is
    Megatron's). HybridModel hands neither on to its rotary embedding.
    """
    rotary = model.rotary_pos_emb
    if language.rope_scaling == "linear":
        rotary.inv_freq = rotary.inv_freq / language.rope_factor
    elif language.rope_scaling == "llama3":
        rotary.inv_freq = rotary._apply_scaling(
            rotary.inv_freq,
            factor=language.rope_factor,
            low_freq_factor=language.rope_low_frequency,
            high_freq_factor=language.rope_high_frequency,
            original_max_position_embeddings=language.rope_original_tokens,
        )
