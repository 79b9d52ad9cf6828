"""The ``config.json`` of a published model: what it says, what it may say, what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unimoe_mcore.checkpoints.facts import Facts, number, positive, shown, size, text, truth
from unimoe_mcore.checkpoints.families import (
    ALIKE,
    FAMILIES,
    IGNORED,
    NEUTRAL,
    REFUSED,
    USED,
    Family,
)
from unimoe_mcore.checkpoints.json_file import read_object
from unimoe_mcore.config.model import LanguageConfig

CONFIG = "config.json"
MOST_CONFIG = 1 << 20
"""Bytes of ``config.json``."""

_ROPE = {
    "default": (),
    "linear": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
}
"""Kind of rotary positions -> what it must say."""


@dataclass(frozen=True)
class Described:
    """What a ``config.json`` says.

    Attributes:
        family: its family.
        language: shape of the language model; its vocabulary is not padded yet.
        whole: the file's facts.
        unused: keys that nothing here asks for.
    """

    family: Family
    language: LanguageConfig
    whole: Facts
    unused: list[str]


def read_config(folder: Path) -> Described:
    """Read a published model's ``config.json``.

    Raises:
        ValueError: if it cannot be read, or says anything that cannot be built here.
        OSError: if it cannot be read.
    """
    whole = read_object(folder / CONFIG, MOST_CONFIG)
    family = _family(whole)
    own = whole.get(family.within, {}) if family.within else whole
    if not isinstance(own, dict):
        raise ValueError(f"{family.within} of {CONFIG} is no object")
    said = {**family.defaults, **own}
    if family.within:
        said.setdefault("tie_word_embeddings", whole.get("tie_word_embeddings"))
    facts = {key: value for key, value in said.items() if value is not None}
    _check_neutral(whole if family.within else {}, family)
    _check_neutral(facts, family)
    known = {*USED, *NEUTRAL, *IGNORED, *family.neutral, "num_experts_per_tok"}
    unused = sorted(key for key in own.keys() - known if not key.startswith("mm_"))
    return Described(family, _shape(facts), whole, unused)


def _family(whole: Facts) -> Family:
    kind = text(whole, "model_type")
    within = "/text_config" if "text_config" in whole else ""
    family = FAMILIES.get(ALIKE.get(kind, kind) + within)
    if family is not None:
        if within and whole["text_config"].get("model_type", "llama") != "llama":
            inner = shown(whole["text_config"]["model_type"])
            raise ValueError(f"its language model is a {inner}, only llama is known in a {kind}")
        return family
    if kind in REFUSED:
        raise ValueError(f"it is a {kind}, which cannot be built here: {REFUSED[kind]}")
    known = ", ".join([*(name for name in FAMILIES if "/" not in name), *ALIKE])
    raise ValueError(f"it is a {shown(kind)}, known are {known}")


def _check_neutral(facts: Facts, family: Family) -> None:
    """Refuse a key that changes the arithmetic.

    Raises:
        ValueError: naming the key.
    """
    neutral = {**NEUTRAL, **family.neutral}
    if family.experts:
        del neutral["num_local_experts"]
    for key, allowed in neutral.items():
        value = facts.get(key)
        if value is not None and value not in allowed:
            raise ValueError(f"{key} of {CONFIG} is {shown(value)}, which cannot be built here")
    layers = facts.get("layer_types")
    if layers is not None and (
        not isinstance(layers, list) or any(each != "full_attention" for each in layers)
    ):
        raise ValueError(f"layer_types of {CONFIG} has other layers than full_attention")


def _shape(facts: Facts) -> LanguageConfig:
    """The language model's shape.

    Raises:
        ValueError: if it cannot be built here.
    """
    hidden, heads = size(facts, "hidden_size"), size(facts, "num_attention_heads")
    kv_heads, most = (
        size(facts, "num_key_value_heads", heads),
        size(facts, "max_position_embeddings"),
    )
    if hidden % (2 * heads):
        raise ValueError(f"its width {hidden} is not {heads} heads of an even size")
    if heads % kv_heads:
        raise ValueError(f"its {heads} heads cannot share {kv_heads} key/value heads evenly")
    if (head := size(facts, "head_dim", hidden // heads)) != hidden // heads:
        raise ValueError(f"head_dim is {head}, not hidden_size / heads = {hidden // heads}")
    if (window := size(facts, "sliding_window", most)) < most:
        raise ValueError(
            f"sliding_window is {window}, less than max_position_embeddings={most}: attention "
            "within a window is not known here"
        )
    if not 0 < (epsilon := number(facts, "rms_norm_eps")) < 1:
        raise ValueError(f"rms_norm_eps is {epsilon}")
    return LanguageConfig(
        blocks=size(facts, "num_hidden_layers"),
        hidden=hidden,
        ffn=size(facts, "intermediate_size"),
        heads=heads,
        kv_heads=kv_heads,
        vocabulary=size(facts, "vocab_size"),
        max_tokens=most,
        norm_eps=epsilon,
        tied=truth(facts, "tie_word_embeddings", False),
        **_rotary(facts),
    )


def _rotary(facts: Facts) -> dict[str, Any]:
    """Base and scaling of the rotary positions, in either of transformers' forms.

    Raises:
        ValueError: if they are of a kind that is not known.
    """
    found = _rope(facts)
    kind = text(found, "rope_type", text(found, "type", "default"))
    base = found.get("rope_theta", facts.get("rope_theta", 10000.0))
    if kind not in _ROPE:
        known = ", ".join(_ROPE)
        raise ValueError(f"its rotary positions are scaled ({shown(kind)}), known are {known}")
    wanted = {"rope_type", "type", "rope_theta", "partial_rotary_factor", *_ROPE[kind]}
    if unknown := sorted(found.keys() - wanted):
        raise ValueError(f"{shown(unknown[0])} is not known of rotary positions ({kind})")
    if number(found, "partial_rotary_factor", 1) != 1:
        raise ValueError("partial_rotary_factor is not 1, which cannot be built here")
    said: dict[str, Any] = {"rope_base": positive({"rope_theta": base}, "rope_theta")}
    if kind == "default":
        return said
    said |= {"rope_scaling": kind, "rope_factor": positive(found, "factor")}
    if kind == "llama3":
        said |= {
            "rope_low_frequency": positive(found, "low_freq_factor"),
            "rope_high_frequency": positive(found, "high_freq_factor"),
            "rope_original_tokens": size(found, "original_max_position_embeddings"),
        }
        if not said["rope_low_frequency"] < said["rope_high_frequency"]:
            raise ValueError("low_freq_factor is not less than high_freq_factor")
    return said


def _rope(facts: Facts) -> Mapping[str, Any]:
    """What says how rotary positions are scaled.

    Raises:
        ValueError: if two things say it, or none that can.
    """
    older, newer = facts.get("rope_scaling"), facts.get("rope_parameters")
    if older is not None and newer is not None and older != newer:
        raise ValueError("rope_scaling and rope_parameters differ: leave one out")
    found = newer if newer is not None else older if older is not None else {}
    if not isinstance(found, dict):
        raise ValueError(f"{shown(found)} says nothing of rotary positions")
    return found
