"""A run's adapters in the form of PEFT, to be loaded onto its export as Llama or Mixtral.

One adapter here covers a fused projection (query, key and value; gate and up). Each of theirs gets
the same ``A`` and its own rows of ``B``, which is exactly the same product.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

from unimoe_mcore.checkpoints.deferred import Deferred
from unimoe_mcore.checkpoints.llama import ATTENTION, DENSE, EXPERT, Rule, of_blocks, sizes_of
from unimoe_mcore.config.errors import UserError
from unimoe_mcore.exporting.exported import Exported, check_routing, check_whole, without_towers
from unimoe_mcore.exporting.mixtral_form import of_block, zeros
from unimoe_mcore.exporting.subject import Subject
from unimoe_mcore.exporting.unpacked import unpacked
from unimoe_mcore.exporting.weights import LANGUAGE, Adapter

_PREFIX = "base_model.model."
"""What PEFT puts in front of a causal language model's names."""


def as_peft(subject: Subject, merge: bool = True) -> Exported:
    """The adapters of a run.

    Args:
        merge: of no meaning: adapters are what is asked for.

    Raises:
        UserError: if it has none, or its model cannot be exported without them.
    """
    check_whole(subject, "PEFT")
    check_adapted(subject)
    if subject.experts:
        check_routing(subject, "Mixtral")
    form = "mixtral" if subject.experts else "llama"
    tensors = adapter_tensors(subject, _mlps(subject), fill=True)
    command = f"python -m unimoe_mcore.export {subject.source} BASE --as {form} --adapters apart"
    return Exported(
        title="LoRA adapters in the form of PEFT",
        use=(
            "peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained("
            "BASE), FOLDER)"
        ),
        tensors={"adapter_model": tensors},
        objects={"adapter_config.json": adapter_config(subject, tensors)},
        notes=[
            f"BASE is the same model without its adapters: `{command}`.",
            "Query, key and value (and gate and up) share one adapter in training: their A are the "
            "same, their B are its rows.",
        ],
        left_out=without_towers(subject),
    )


def check_adapted(subject: Subject) -> None:
    """Refuse a model without adapters.

    Raises:
        UserError: saying so.
    """
    if not subject.weights.adapted:
        raise UserError(
            f"{subject.source} has no adapters: it trained none (stage.lora), or gave them merged "
            f"into its weights; name the run for those of its checkpoint."
        )


def adapter_config(subject: Subject, tensors: Mapping[str, Deferred]) -> dict[str, Any]:
    """``adapter_config.json``."""
    rank = next(t.shape[0] for name, t in tensors.items() if ".lora_A." in name)
    modules = {_kind(name) for name in tensors}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": rank,
        "lora_alpha": subject.weights.scale * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "target_modules": sorted(modules),
        "inference_mode": True,
    }


def adapter_tensors(
    subject: Subject, mlps: Iterable[tuple[Rule, int | None]], fill: bool = False
) -> dict[str, Deferred]:
    """Both halves of every adapter, by PEFT's names.

    Args:
        mlps: the fused projections of the MLPs, and the expert that each is of.
        fill: PEFT adapts a projection in all blocks or in none: where some have an adapter on it
            and others have not, give those one of zeros.
    """
    attention = [
        (rule, None)
        for rule in of_blocks(ATTENTION, subject.language)
        if len(rule.shapes[0]) == 2  # no norm
    ]
    found: dict[str, Deferred] = {}
    without: list[Rule] = []
    for rule, expert in chain(attention, mlps):
        adapter = subject.weights.adapter(LANGUAGE + rule.ours, expert)
        if adapter is None:
            without.append(rule)
        else:
            found.update(_halves(subject, rule, adapter))
    kinds = {_kind(name) for name in found}
    for rule in without:
        if fill and _kind(rule.theirs[0]) in kinds:
            found.update(_zeros(subject, rule, next(iter(found.values())).shape[0]))
    return found


def _mlps(subject: Subject) -> Iterator[tuple[Rule, int | None]]:
    if not subject.experts:
        yield from ((rule, None) for rule in of_blocks(DENSE, subject.language))
        return
    for block in range(subject.language.blocks):
        for expert in range(subject.experts):
            for rule in of_block(EXPERT, block, expert=expert):
                yield rule, expert if block in subject.sparse else None


def _halves(subject: Subject, rule: Rule, adapter: Adapter) -> Iterator[tuple[str, Deferred]]:
    for name, half in unpacked(rule, adapter.b, subject.language):
        yield _named(name, "A"), adapter.a
        yield _named(name, "B"), half


def _zeros(subject: Subject, rule: Rule, rank: int) -> Iterator[tuple[str, Deferred]]:
    sizes = sizes_of(subject.language)
    for name, axes in zip(rule.theirs, rule.shapes, strict=True):
        yield _named(name, "A"), zeros(rank, sizes[axes[1]])
        yield _named(name, "B"), zeros(sizes[axes[0]], rank)


def _named(weight: str, half: str) -> str:
    return f"{_PREFIX}{weight.removesuffix('.weight')}.lora_{half}.weight"


def _kind(name: str) -> str:
    """The projection that a weight or an adapter is of, whatever its block: ``q_proj``, ``w1``."""
    return name.split(".lora_", 1)[0].removesuffix(".weight").rsplit(".", 1)[-1]
