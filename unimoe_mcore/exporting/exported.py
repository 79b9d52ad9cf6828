"""What an export's folder will hold, in whichever form; and what every form says of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from unimoe_mcore.checkpoints.deferred import Deferred
from unimoe_mcore.config.errors import UserError
from unimoe_mcore.exporting.subject import Subject


@dataclass(frozen=True)
class Exported:
    """A model in others' form.

    Attributes:
        title: what it is, in a few words.
        use: how it is loaded.
        tensors: stem of a file's name -> name of theirs -> values.
        objects: name of a JSON file -> what it says.
        tokenizer: whether it needs one.
        notes: what whoever loads it should know.
        left_out: what of the model is not in it -> why.
    """

    title: str
    use: str
    tensors: Mapping[str, Mapping[str, Deferred]]
    objects: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    tokenizer: bool = False
    notes: Sequence[str] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)


def config_of(subject: Subject) -> dict[str, Any]:
    """``config.json`` of the dense part, in the names that every version of transformers reads."""
    language, tokenizer = subject.language, subject.tokenizer
    facts: dict[str, Any] = {
        "vocab_size": language.words,
        "hidden_size": language.hidden,
        "intermediate_size": language.ffn,
        "num_hidden_layers": language.blocks,
        "num_attention_heads": language.heads,
        "num_key_value_heads": language.kv_heads,
        "head_dim": language.hidden // language.heads,
        "hidden_act": "silu",
        "max_position_embeddings": language.max_tokens,
        "rms_norm_eps": language.norm_eps,
        "rope_theta": float(language.rope_base),
        "rope_scaling": _rope_scaling(subject),
        "tie_word_embeddings": language.tied,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": language.init_std,
        "use_cache": True,
    }
    if tokenizer is not None:
        first = tokenizer.template.pieces(tokenizer.template.begin)[:1]
        special = bool(first) and first[0] in tokenizer.template.special
        facts |= {
            "bos_token_id": tokenizer.structure(first[0])[0] if special else None,
            "eos_token_id": tokenizer.end,
            "pad_token_id": tokenizer.pad,
        }
    return facts


def generation_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """``generation_config.json``: the likeliest token, as ``generate`` here says by default."""
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {"do_sample": False, **{key: config[key] for key in ids}}


def _rope_scaling(subject: Subject) -> dict[str, Any] | None:
    language = subject.language
    if language.rope_scaling == "none":
        return None
    said: dict[str, Any] = {"rope_type": language.rope_scaling, "factor": language.rope_factor}
    if language.rope_scaling == "llama3":
        said |= {
            "low_freq_factor": language.rope_low_frequency,
            "high_freq_factor": language.rope_high_frequency,
            "original_max_position_embeddings": language.rope_original_tokens,
        }
    return said


def without_towers(subject: Subject) -> dict[str, str]:
    """The connectors, and the encoders that a run has trained: a language model has neither."""
    found = {}
    for tower in subject.towers:
        parts = {name.split(".", 1)[0] for name in subject.weights.tower(tower)}
        for part in sorted(parts):
            found[f"{part}.{tower}"] = "a language model has no place for it; it answers text only"
    return found


def check_whole(subject: Subject, form: str) -> None:
    """Refuse what is no language model by itself.

    Raises:
        UserError: saying what to export instead.
    """
    if subject.kind == "align":
        raise UserError(
            f"{subject.source} has trained connectors only, which {form} has no place for: export "
            f"its base."
        )
    if subject.tokenizer is None:
        raise UserError(
            f"{subject.source} holds an expert without its base: name it in its run's folder, or "
            f"export it --as uni-moe."
        )


def check_routing(subject: Subject, form: str) -> None:
    """Refuse a mixture that chooses or weighs experts in another way than Mixtral and Uni-MoE do.

    Those take the softmax over the logits of the chosen experts. What only training does (losses,
    jitter, capacity) is no reason.

    Raises:
        UserError: with the reason.
    """
    reasons = {
        "pre_softmax": "its experts' weights are shares of the softmax over all experts and do not "
        "sum to 1 (model.moe.score=pre_softmax)",
        "sigmoid": "its experts' weights come from sigmoids (model.moe.score=sigmoid)",
    }
    reason = reasons.get(subject.moe.score, "")
    if subject.moe.balance == "bias":
        reason = "its experts are chosen by score and bias (model.moe.balance=bias)"
    if subject.shared:
        reason = "every token passes a shared expert (stage.shared_expert)"
    if reason:
        raise UserError(f"{subject.source} has no equal in {form}: {reason}.")
