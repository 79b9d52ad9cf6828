"""Experts and mixtures under the names of Uni-MoE's own files, as safetensors.

Facts: HITsz-TMG/UMOE-Scaling-Unified-Multimodal-LLMs at f5e82dd. An expert's file has dense MLPs; a
mixture has ``mlp.experts.{e}`` and ``mlp.gate``; the projector of pictures is LLaVA's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from unimoe_mcore.checkpoints.deferred import Deferred
from unimoe_mcore.checkpoints.llama import DENSE, ROUTER, Rule, of_blocks, rules_of
from unimoe_mcore.checkpoints.llava import PROJECTOR
from unimoe_mcore.config.errors import UserError
from unimoe_mcore.exporting.exported import Exported, check_routing, config_of
from unimoe_mcore.exporting.llama_form import theirs
from unimoe_mcore.exporting.mixtral_form import of_block, router
from unimoe_mcore.exporting.peft_form import adapter_config, adapter_tensors
from unimoe_mcore.exporting.subject import Subject

_PLACEMENTS = ("interval", "all")
_NOTE = (
    "Names and shapes are those of Uni-MoE's files; that code has not read these here. It reads "
    "pickles: torch.save(safetensors.torch.load_file(FILE), NAME.bin) makes one."
)


def _renamed(rules: tuple[Rule, ...], pattern: str, name: str) -> tuple[Rule, ...]:
    return tuple(
        replace(rule, theirs=tuple(re.sub(pattern, name, each) for each in rule.theirs))
        for rule in rules
    )


EXPERT = _renamed(DENSE, r"\.mlp\.", ".mlp.experts.{expert}.")
GATE = _renamed(ROUTER, r"\.block_sparse_moe\.", ".mlp.")


def as_unimoe(subject: Subject, merge: bool) -> Exported:
    """An expert, a mixture, or a connector alone.

    Args:
        merge: add adapters to the weights; else they are in a file of their own.

    Raises:
        UserError: if nothing of it, or not how it routes tokens, has an equal there.
    """
    projector, left_out = _projector(subject)
    connectors = {"mm_projector": projector} if projector else {}
    if subject.kind == "align":
        if not projector:
            reasons = "; ".join(f"{part}: {why}" for part, why in left_out.items())
            raise UserError(f"{subject.source} has nothing with an equal in Uni-MoE: {reasons}.")
        return _exported("A projector", connectors, {}, left_out)
    if subject.kind == "expert":
        rules = of_blocks(DENSE, subject.language)
        expert = {f"mlp_{subject.expert}": theirs(subject, rules, merge=True)}
        return _exported(f"An expert ({subject.expert})", {**expert, **connectors}, {}, left_out)
    if not subject.experts:
        raise UserError(f"{subject.source} has no experts: export it --as llama.")
    return _mixture(subject, merge, connectors, left_out)


def _mixture(
    subject: Subject,
    merge: bool,
    connectors: Mapping[str, Mapping[str, Deferred]],
    left_out: Mapping[str, str],
) -> Exported:
    check_routing(subject, "Uni-MoE")
    if subject.moe.placement not in _PLACEMENTS:
        raise UserError(
            f"{subject.source} has no equal in Uni-MoE: it has experts in the blocks "
            f"{subject.moe.placement} (model.moe.placement), Uni-MoE in {' or '.join(_PLACEMENTS)}."
        )
    tensors: dict[str, Mapping[str, Deferred]] = {
        "model": _model(subject, merge),
        "mlp_gates": _gates(subject),
        **connectors,
    }
    objects: dict[str, Mapping[str, Any]] = {"config.json": _config(subject, connectors)}
    if subject.weights.adapted and not merge:
        adapters = adapter_tensors(subject, _projections(subject))
        tensors["adapter_model"] = adapters
        objects["adapter_config.json"] = adapter_config(subject, adapters)
    return _exported("A mixture", tensors, objects, left_out)


def _exported(
    what: str,
    tensors: Mapping[str, Mapping[str, Deferred]],
    objects: Mapping[str, Mapping[str, Any]],
    left_out: Mapping[str, str],
) -> Exported:
    return Exported(
        title=f"{what} under the names of Uni-MoE's files",
        use="safetensors.torch.load_file(FILE)",
        tensors=tensors,
        objects=objects,
        tokenizer="config.json" in objects,
        notes=[_NOTE],
        left_out=left_out,
    )


def _model(subject: Subject, merge: bool) -> dict[str, Deferred]:
    found = theirs(subject, rules_of(subject.language, ()), merge)
    for block in range(subject.language.blocks):
        if block not in subject.sparse:
            found.update(theirs(subject, of_block(DENSE, block), merge))
            continue
        for expert in range(subject.experts):
            rules = of_block(EXPERT, block, expert=expert)
            found.update(theirs(subject, rules, merge, expert))
    return found


def _gates(subject: Subject) -> dict[str, Deferred]:
    rules = [rule for block in subject.sparse for rule in of_block(GATE, block)]
    return {rule.theirs[0]: router(subject, rule) for rule in rules}


def _projections(subject: Subject) -> Iterator[tuple[Rule, int | None]]:
    """The fused projections of every block's MLPs, and the expert each is of."""
    for block in range(subject.language.blocks):
        if block not in subject.sparse:
            yield from ((rule, None) for rule in of_block(DENSE, block))
            continue
        for expert in range(subject.experts):
            yield from ((rule, expert) for rule in of_block(EXPERT, block, expert=expert))


def _config(subject: Subject, connectors: Mapping[str, Any]) -> dict[str, Any]:
    projector = {"mm_projector_type": "mlp2x_gelu"} if connectors else {}
    return {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava",
        **config_of(subject),
        **projector,
        "moe": True,
        "num_experts": subject.experts,
        "num_experts_per_tok": subject.moe.top_k,
    }


def _projector(subject: Subject) -> tuple[dict[str, Deferred], dict[str, str]]:
    """LLaVA's projector of pictures, and what of the towers has no equal, with the reason."""
    projector: dict[str, Deferred] = {}
    left_out: dict[str, str] = {}
    for tower, config in subject.towers.items():
        tensors = subject.weights.tower(tower)
        reason = _unequal(tower, config["connector"])
        if not reason:
            for rule in PROJECTOR:
                projector[rule.theirs[0]] = tensors.pop(rule.ours)
        for name in tensors:
            part = ".".join(name.split(".")[: 3 if not reason else 2])
            left_out[part] = reason or "it has no equal in Uni-MoE's projector"
    return projector, left_out


def _unequal(tower: str, connector: Mapping[str, Any]) -> str:
    """Why a connector is none of Uni-MoE's; empty if it is its projector of pictures."""
    if tower != "image":
        return f"Uni-MoE's connector of {tower} has other modules"
    if connector["name"] != "mlp2x_gelu":
        return f"Uni-MoE's projector is mlp2x_gelu, not {connector['name']}"
    more = {
        "a norm before it (input_norm)": connector["input_norm"],
        "learned positions (positions)": connector["positions"],
        "several features a token (stack)": connector["stack"] != 1,
    }
    having = [what for what, there in more.items() if there]
    return f"it has {' and '.join(having)}, Uni-MoE's projector has not" if having else ""
