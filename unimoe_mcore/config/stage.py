"""A stage as a declaration: what it stands on, what it takes, what trains, what it gives."""

from __future__ import annotations

from dataclasses import dataclass, field

from unimoe_mcore.config.model import LoRAConfig

KINDS = ("base", "align", "expert", "moe")

OWN_MLP = "base"
"""As an entry of ``experts``: the base's own MLP."""


@dataclass
class StageConfig:
    """One run of the progressive schedule.

    Attributes:
        kind: ``base`` (a language model from text; gives a base folder), ``align`` (stage 1:
            gives connectors), ``expert`` (stage 2: gives one expert artefact), ``moe`` (stage 3:
            gives the mixture's trained parts).
        base: folder of the base that the stage stands on; empty for ``base``.
        expert: for ``expert``: the modality it is specialised in, a tower's name.
        expert_datasets: for ``expert``: what each modality's run draws from; the recipe points
            ``data.datasets`` into it.
        expert_steps: for ``expert``: each modality's optimizer steps; the recipe points
            ``trainer.steps`` into it.
        start: for ``expert``: the stage-1 folder whose connectors the run starts from.
        experts: for ``moe``: one entry per expert, in order: ``base`` (the base's own MLP) or the
            folder that a stage-2 run gave.
        connectors: for ``moe``: tower -> folder it comes from. A tower that is not named takes
            the connector of the one expert run specialised in it, else that of ``start``.
        init_from: another run, one of its checkpoints, or what it gave: what this run trains
            begins with the values that it holds, as far as it holds them; the steps begin at 0.
        train: parts that train (``unimoe_mcore.model.parts``); all else is frozen.
        lora: adapters added before training.
    """

    kind: str = "base"
    base: str = ""
    expert: str = ""
    expert_datasets: dict[str, dict[str, float]] = field(default_factory=dict)
    expert_steps: dict[str, int] = field(default_factory=dict)
    start: str = ""
    experts: list[str] = field(default_factory=list)
    connectors: dict[str, str] = field(default_factory=dict)
    init_from: str = ""
    train: list[str] = field(default_factory=list)
    lora: LoRAConfig = field(default_factory=LoRAConfig)
