"""A mixture in the form of transformers' ``MixtralForCausalLM``.

Mixtral has experts in every block. A dense block becomes equal experts under a router of zeros:
their weights sum to 1, whichever are chosen, so the block's output is that of its MLP.
"""

from __future__ import annotations

import torch

from unimoe_mcore.checkpoints.deferred import Deferred
from unimoe_mcore.checkpoints.llama import EXPERT, ROUTER, Rule, rules_of
from unimoe_mcore.config.errors import UserError
from unimoe_mcore.exporting.exported import (
    Exported,
    check_routing,
    check_whole,
    config_of,
    generation_config,
    without_towers,
)
from unimoe_mcore.exporting.llama_form import adapters_left_out, theirs
from unimoe_mcore.exporting.subject import Subject
from unimoe_mcore.exporting.weights import LANGUAGE

DENSE_BLOCKS = "unimoe_dense_blocks"
"""Key of ``config.json`` with the blocks whose experts are all the same."""


def as_mixtral(subject: Subject, merge: bool) -> Exported:
    """The language model of a stage-3 run.

    Args:
        merge: add adapters to the weights; else they are left out.

    Raises:
        UserError: if it has no experts, or routes tokens in a way that Mixtral has not.
    """
    check_whole(subject, "Mixtral")
    if not subject.experts:
        raise UserError(f"{subject.source} has no experts: export it --as llama.")
    check_routing(subject, "Mixtral")
    dense = [b for b in range(subject.language.blocks) if b not in subject.sparse]
    config = {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        **config_of(subject),
        "num_local_experts": subject.experts,
        "num_experts_per_tok": subject.moe.top_k,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.0,
        "router_jitter_noise": 0.0,
        "sliding_window": None,
        DENSE_BLOCKS: dense,
    }
    notes = [
        "The router's logits are computed in fp32 here, by transformers in the model's type: in "
        "bf16, tokens for which two experts are nearly level may take another one."
    ]
    if dense:
        notes.insert(
            0,
            f"Blocks {', '.join(map(str, dense))} (from 0) are dense: each of their "
            f"{subject.experts} experts is the same MLP and their router is zero, so whichever are "
            f"chosen, the output is the MLP's. They take {subject.experts} times its memory and "
            f"{subject.moe.top_k} times its time.",
        )
    return Exported(
        title="A mixture of experts in the form of Mixtral",
        use="transformers.AutoModelForCausalLM.from_pretrained(FOLDER)",
        tensors={"model": _tensors(subject, merge)},
        objects={
            "config.json": config,
            "generation_config.json": generation_config(config),
        },
        tokenizer=True,
        notes=notes,
        left_out={**without_towers(subject), **adapters_left_out(subject, merge)},
    )


def _tensors(subject: Subject, merge: bool) -> dict[str, Deferred]:
    found = theirs(subject, rules_of(subject.language, ()), merge)
    nothing = zeros(subject.experts, subject.language.hidden)
    for block in range(subject.language.blocks):
        mixed = block in subject.sparse
        for rule in of_block(ROUTER, block):
            found[rule.theirs[0]] = router(subject, rule) if mixed else nothing
        for expert in range(subject.experts):
            rules = of_block(EXPERT, block, expert=expert)
            found.update(theirs(subject, rules, merge, expert if mixed else None))
    return found


def of_block(rules: tuple[Rule, ...], block: int, **numbers: int) -> list[Rule]:
    """A block's rules with its numbers filled in."""
    return [
        rule.of(block=block, attention=2 * block, mlp=2 * block + 1, **numbers) for rule in rules
    ]


def router(subject: Subject, rule: Rule) -> Deferred:
    """A block's router, ``[experts, hidden]``."""
    return subject.weights.router(LANGUAGE + rule.ours, subject.experts)


def zeros(*shape: int) -> Deferred:
    """A tensor of zeros."""
    return Deferred(shape, lambda: torch.zeros(shape))
