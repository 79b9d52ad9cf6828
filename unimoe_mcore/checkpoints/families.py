"""Families of published language models: a table each of what theirs say, and what we make of it.

Another family is another entry of ``FAMILIES``. What a key of ``config.json`` says is used, or is
one of the values that change nothing here, or the model is refused by the key's name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

USED = {
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "head_dim",
    "sliding_window",
    "initializer_range",
    "layer_types",
}
"""Keys that make the language model's shape (``unimoe_mcore.checkpoints.hf_config``)."""

_NONE = (None, False)
NEUTRAL: Mapping[str, Sequence[Any]] = {
    "hidden_act": ("silu",),
    "attention_bias": _NONE,
    "attention_out_bias": _NONE,
    "qkv_bias": _NONE,
    "mlp_bias": _NONE,
    "use_bias": _NONE,
    "bias": _NONE,
    "lm_head_bias": _NONE,
    "partial_rotary_factor": (None, 1),
    "rotary_pct": (None, 1),
    "rope_interleaved": _NONE,
    "no_rope_layers": (None, []),
    "use_sliding_window": _NONE,
    "use_qk_norm": _NONE,
    "qk_norm": _NONE,
    "qk_layernorm": _NONE,
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "query_pre_attn_scalar": (None,),
    "attention_multiplier": (None,),
    "embedding_multiplier": (None, 1),
    "residual_multiplier": (None, 1),
    "logit_scale": (None, 1),
    "logits_scaling": (None, 1),
    "scale_emb": (None, 1),
    "num_local_experts": (None, 0, 1),
    "num_experts": (None, 0, 1),
    "n_routed_experts": (None, 0),
    "add_cross_attention": _NONE,
    "quantization_config": (None,),
    "compression_config": (None,),
    "auto_map": (None, {}),
    "moe": _NONE,
}
"""Key of ``config.json`` that changes the arithmetic -> values with which it does not; a key that
is missing changes nothing."""

IGNORED = {
    "_name_or_path",
    "architectures",
    "attention_dropout",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "is_llama_config",
    "output_router_logits",
    "pad_token_id",
    "pretraining_tp",
    "router_aux_loss_coef",
    "router_jitter_noise",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}
"""Keys of training, of generation, or of how transformers computes the same."""

_VISION = "the vision tower: encoders come from their own packages"


@dataclass(frozen=True)
class Family:
    """What is particular to one ``model_type``.

    Attributes:
        defaults: key -> what a missing one means; other keys must be there.
        renamed: pattern of a whole name of theirs -> the name in our tables.
        skipped: pattern of a whole name -> why such a tensor is not taken.
        neutral: more of ``NEUTRAL``, or other values.
        within: key under which ``config.json`` has the language model's, if it has.
        experts: whether every block has experts (``num_local_experts``).
        projector: the form of its projector of pictures (``unimoe_mcore.checkpoints.llava``).
    """

    defaults: Mapping[str, Any] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)
    neutral: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    within: str = ""
    experts: bool = False
    projector: str = ""


SKIPPED = {
    r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq": "computed from config.json",
    r"model\.rotary_emb\.inv_freq": "computed from config.json",
}
"""``Family.skipped`` of every family."""

_SHAPE_OF_LLAMA = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
}

FAMILIES: Mapping[str, Family] = {
    "llama": Family(),  # Llama 1 to 3, Vicuna, SmolLM2, TinyLlama ...
    "mistral": Family(defaults={"sliding_window": 4096, "num_key_value_heads": 8}),
    "mixtral": Family(
        defaults={"num_key_value_heads": 8, "rope_theta": 1e6},
        # The names of transformers 5 in memory; it stores the older ones.
        renamed={
            r"model\.layers\.(\d+)\.mlp\.gate\.weight": (
                r"model.layers.\1.block_sparse_moe.gate.weight"
            ),
        },
        experts=True,
    ),
    # LLaVA's own files, and those of its successors that kept the form.
    "llava": Family(
        skipped={
            r"model\.vision_tower\..*": _VISION,
            r"model\.image_newline": "of LLaVA 1.6, whose tiled pictures are unknown here",
        },
        neutral={"mm_use_im_start_end": _NONE, "mm_use_im_patch_token": _NONE},
        projector="mm",
    ),
    # The same model in transformers' form.
    "llava/text_config": Family(
        defaults=_SHAPE_OF_LLAMA,
        renamed={
            r"(?:model\.)?language_model\.model\.(.*)": r"model.\1",
            r"model\.language_model\.(?!model\.)(.*)": r"model.\1",
            r"language_model\.lm_head\.weight": r"lm_head.weight",
            r"(?:model\.)?multi_modal_projector\.linear_1\.(weight|bias)": (
                r"model.mm_projector.0.\1"
            ),
            r"(?:model\.)?multi_modal_projector\.linear_2\.(weight|bias)": (
                r"model.mm_projector.2.\1"
            ),
        },
        skipped={r"(?:model\.)?vision_tower\..*": _VISION},
        within="text_config",
        projector="vision_config",
    ),
}
"""``model_type`` of ``config.json`` (and where the language model's keys are) -> family."""

ALIKE = {"llava_llama": "llava"}
"""``model_type`` -> the family that is the same."""

REFUSED = {
    "qwen2": "its queries, keys and values have biases",
    "qwen3": "its queries and keys are normalised",
    "phi3": "its matrices are fused and its positions scaled in a form of its own",
    "gemma": "its norms and activation are others",
    "gemma2": "its norms and activation are others",
    "gpt_neox": "its norms have biases",
}
"""``model_type`` that is often asked for -> why it cannot be built here."""
