"""A stage as a declaration: what it stands on, what it takes, what trains, what it gives."""

from __future__ import annotations

from dataclasses import dataclass, field

from unimoe_mcore.config.model import LoRAConfig

KINDS = ("base", "align", "expert", "moe", "dense")

OWN_MLP = "base"
"""As an entry of ``experts``: the base's own MLP."""


GROUPS_OF_PARTS = {"connectors": "connector.", "encoders": "encoder."}
"""Names that stand for one part of every tower, and how the parts' names begin."""


@dataclass
class RateConfig:
    """How one part trains where it differs from the rest; what is left out is the trainer's.

    Attributes:
        lr: highest learning rate.
        lr_scale: in place of ``lr``: factor on ``trainer.lr``.
        warmup: steps of linear warm-up.
        weight_decay: AdamW's.
    """

    lr: float | None = None
    lr_scale: float | None = None
    warmup: int | None = None
    weight_decay: float | None = None


@dataclass
class StageConfig:
    """One run of the progressive schedule.

    Attributes:
        kind: ``base`` (a language model from text; gives a base folder), ``align`` (stage 1:
            gives connectors), ``expert`` (stage 2: gives one expert artefact), ``moe`` (stage 3:
            gives the mixture's trained parts), ``dense`` (what the mixture is compared with: one
            MLP a block for all modalities; gives its trained parts).
        base: folder of the base that the stage stands on; empty for ``base``.
        expert: for ``expert``: the modality it is specialised in, a tower's name.
        expert_datasets: for ``expert``: what each modality's run draws from; the recipe points
            ``data.datasets`` into it.
        expert_steps: for ``expert``: each modality's optimizer steps; the recipe points
            ``trainer.steps`` into it.
        start: the stage-1 folder whose connectors the run starts from; needed for ``expert`` and
            ``dense``.
        experts: for ``moe``: one entry per expert, in order: ``base`` (the base's own MLP) or the
            folder that a stage-2 run gave. A composed recipe names as many as
            ``model.moe.experts`` says.
        shared_expert: for ``moe``: where an MLP comes from that every token of a block with experts
            passes besides those it is sent to, named like one of ``experts``; empty for none. Its
            output is added to theirs; adapters on ``mlp`` are also on it.
        connectors: for ``moe``: tower -> folder it comes from. A tower that is not named takes
            the connector of the one expert run specialised in it, else that of ``start``.
        init_from: another run, one of its checkpoints, or what it gave: what this run trains
            begins with the values that it holds, as far as it holds them; the steps begin at 0.
        train: parts that train (``unimoe_mcore.model.parts``); all else is frozen. ``connectors``
            and ``encoders`` stand for those of all towers. An encoder that trains runs in the
            forward pass; the others' features are cached.
        rates: part (or ``connectors``, ``encoders``) -> how it trains where it differs.
        lora: adapters added before training.
    """

    kind: str = "base"
    base: str = ""
    expert: str = ""
    expert_datasets: dict[str, dict[str, float]] = field(default_factory=dict)
    expert_steps: dict[str, int] = field(default_factory=dict)
    start: str = ""
    experts: list[str] = field(default_factory=list)
    shared_expert: str = ""
    connectors: dict[str, str] = field(default_factory=dict)
    init_from: str = ""
    train: list[str] = field(default_factory=list)
    rates: dict[str, RateConfig] = field(default_factory=dict)
    lora: LoRAConfig = field(default_factory=LoRAConfig)


def in_turn(entries: list[str], experts: int) -> list[str]:
    """The entries over and over in their order until there are so many experts.

    As they are where ``experts`` is 0 or no multiple of their number.
    """
    if not experts or not entries or experts % len(entries):
        return entries
    return entries * (experts // len(entries))


def stands_for(name: str, part: str) -> bool:
    """Whether ``name``, as a recipe says it, means ``part`` or a group that it belongs to."""
    group = GROUPS_OF_PARTS.get(name)
    return name == part or (group is not None and part.startswith(group))


def trains(stage: StageConfig, part: str) -> bool:
    """Whether a stage trains a part."""
    return any(stands_for(name, part) for name in stage.train)


def rate_of(stage: StageConfig, part: str) -> str:
    """The key of ``stage.rates`` that a part follows: its own, else its group's, else ``""``."""
    if part in stage.rates:
        return part
    return next((name for name in stage.rates if stands_for(name, part)), "")
