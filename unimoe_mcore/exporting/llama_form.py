"""A dense model in the form of transformers' ``LlamaForCausalLM``."""

from __future__ import annotations

from collections.abc import Sequence

from unimoe_mcore.checkpoints.deferred import Deferred
from unimoe_mcore.checkpoints.llama import DENSE, Rule, rules_of
from unimoe_mcore.config.errors import UserError
from unimoe_mcore.exporting.exported import (
    Exported,
    check_whole,
    config_of,
    generation_config,
    without_towers,
)
from unimoe_mcore.exporting.subject import Subject
from unimoe_mcore.exporting.unpacked import unpacked
from unimoe_mcore.exporting.weights import LANGUAGE

ADAPTERS_APART = "left out as asked (--adapters apart): export them --as peft"


def as_llama(subject: Subject, merge: bool) -> Exported:
    """The language model of a base or of a dense run.

    Args:
        merge: add adapters to the weights; else they are left out.

    Raises:
        UserError: if it has experts, or is no language model.
    """
    check_whole(subject, "Llama")
    if subject.experts:
        raise UserError(
            f"{subject.source} has {subject.experts} experts, a Llama has none: export it --as "
            f"mixtral."
        )
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **config_of(subject)}
    return Exported(
        title="A language model in the form of Llama",
        use="transformers.AutoModelForCausalLM.from_pretrained(FOLDER)",
        tensors={"model": theirs(subject, rules_of(subject.language, DENSE), merge)},
        objects={
            "config.json": {**config, "mlp_bias": False},
            "generation_config.json": generation_config(config),
        },
        tokenizer=True,
        left_out={**without_towers(subject), **adapters_left_out(subject, merge)},
    )


def theirs(
    subject: Subject, rules: Sequence[Rule], merge: bool, expert: int | None = None
) -> dict[str, Deferred]:
    """Their tensors by the rules of ours.

    Args:
        rules: with their numbers filled in.
        expert: which expert's weights ours are; None where blocks are dense.
    """
    weights, found = subject.weights, dict[str, Deferred]()
    value = weights.merged if merge else weights.weight
    for rule in rules:
        found.update(unpacked(rule, value(LANGUAGE + rule.ours, expert), subject.language))
    return found


def adapters_left_out(subject: Subject, merge: bool) -> dict[str, str]:
    """The run's adapters, if it has some and they are not merged."""
    return {"LoRA": ADAPTERS_APART} if subject.weights.adapted and not merge else {}
