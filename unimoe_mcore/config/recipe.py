"""A whole recipe: the type that Hydra composes and every process receives."""

from __future__ import annotations

from dataclasses import dataclass, field

from unimoe_mcore.config.data import DataConfig
from unimoe_mcore.config.model import ModelConfig
from unimoe_mcore.config.parallel import ParallelConfig
from unimoe_mcore.config.stage import StageConfig
from unimoe_mcore.config.trainer import LoggingConfig, PathsConfig, TrainerConfig


@dataclass
class Recipe:
    """One run.

    Attributes:
        name: of the run directory; the same over restarts.
        stage: what the run stands on, trains and gives.
        model: language model, experts, towers.
        data: what it draws.
        parallel: the layout.
        trainer: optimisation, checkpoints, evaluation.
        logging: mirrors.
        paths: where things are.
    """

    name: str = "run"
    stage: StageConfig = field(default_factory=StageConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    paths: PathsConfig = field(default_factory=PathsConfig)
