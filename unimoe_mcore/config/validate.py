"""Checks of a composed recipe; every problem is reported, not only the first."""

from __future__ import annotations

import math
from collections.abc import Iterator

from unimoe_mcore.config.data import DataConfig
from unimoe_mcore.config.model import (
    PLACEMENTS,
    ROPE_SCALINGS,
    LanguageConfig,
    MoEConfig,
    moe_blocks,
)
from unimoe_mcore.config.parallel import check_layout, check_tested
from unimoe_mcore.config.rates import rate_problems
from unimoe_mcore.config.recipe import Recipe
from unimoe_mcore.config.routing import check_routing
from unimoe_mcore.config.stage import KINDS, StageConfig
from unimoe_mcore.config.towers import FRAME_ORDERS, TowerConfig
from unimoe_mcore.config.trainer import (
    CHANGEABLE,
    GIVES,
    PRECISIONS,
    RECOMPUTE,
    SPLITS,
    TRACED_RANKS,
    WANDB_MODES,
    TrainerConfig,
    ValidationConfig,
)

COMPOSITIONS = ("mixed", "uniform")
DEALINGS = ("balanced", "sharded")
MISSING = ("refuse", "skip")
LORA_TARGETS = ("attention", "mlp", "experts")


SMALLEST_VOCABULARY = 264
"""256 bytes and the special tokens of ``data_pipeline.conversation.tokenizer``."""


def validate(recipe: Recipe, world_size: int | None = None) -> list[str]:
    """Everything that is wrong with a recipe, a sentence each; empty if nothing is.

    Args:
        world_size: processes of the run; None to assume ``parallel.processes``.
    """
    problems = [
        *_choices(recipe),
        *_stage(recipe),
        *_language(recipe.model.language),
        *_trainer(recipe.trainer),
        *_data(recipe),
        *check_routing(recipe),
    ]
    for name, tower in recipe.model.towers.items():
        problems += _tower(name, tower)
    if not problems:
        problems += check_layout(recipe.parallel, world_size or recipe.parallel.processes)
        problems += check_tested(recipe.parallel)
        problems += _experts(recipe)
    return problems


def _choices(recipe: Recipe) -> Iterator[str]:
    for key, value, allowed in (
        ("stage.kind", recipe.stage.kind, KINDS),
        ("model.language.rope_scaling", recipe.model.language.rope_scaling, ROPE_SCALINGS),
        ("model.moe.placement", recipe.model.moe.placement, PLACEMENTS),
        ("data.compose", recipe.data.compose, COMPOSITIONS),
        ("data.deal", recipe.data.deal, DEALINGS),
        ("data.missing", recipe.data.missing, MISSING),
        ("trainer.precision", recipe.trainer.precision, PRECISIONS),
        ("trainer.recompute", recipe.trainer.recompute, RECOMPUTE),
        ("trainer.profile.ranks", recipe.trainer.profile.ranks, TRACED_RANKS),
        ("trainer.evaluation.split", recipe.trainer.evaluation.split, SPLITS),
        ("trainer.validation.split", recipe.trainer.validation.split, SPLITS),
        ("trainer.validation.give", recipe.trainer.validation.give, GIVES),
        ("logging.wandb.mode", recipe.logging.wandb.mode, WANDB_MODES),
        *(("stage.lora.targets", target, LORA_TARGETS) for target in recipe.stage.lora.targets),
    ):
        if value not in allowed:
            yield f"{key} is {value!r}, it must be one of {', '.join(allowed)}"


def _stage(recipe: Recipe) -> Iterator[str]:
    stage = recipe.stage
    if not recipe.name or "/" in recipe.name or recipe.name.startswith("."):
        yield f"name is {recipe.name!r}, it must be a plain folder name"
    if stage.kind != "base" and not stage.base:
        yield f"stage.base is empty, a {stage.kind} stage needs a base to stand on"
    if stage.kind == "expert" and stage.expert not in recipe.model.towers:
        known = ", ".join(recipe.model.towers)
        yield f"stage.expert is {stage.expert!r}, it must name a tower ({known})"
    if stage.kind in ("expert", "dense") and not stage.start:
        article = "an" if stage.kind == "expert" else "a"
        yield f"stage.start is empty, {article} {stage.kind} stage needs the connectors of stage 1"
    if stage.kind == "moe":
        yield from _number_of_experts(stage, recipe.model.moe)
    elif stage.experts:
        yield f"stage.experts is given, but only a moe stage has experts, not a {stage.kind} stage"
    for tower in stage.connectors:
        if tower not in recipe.model.towers:
            yield f"stage.connectors names {tower!r}, which is no tower of model.towers"
    yield from _parts(recipe)


def _number_of_experts(stage: StageConfig, moe: MoEConfig) -> Iterator[str]:
    named = len(stage.experts)
    if not named:
        yield "stage.experts is empty, a moe stage needs at least one expert"
    elif moe.experts and named != moe.experts:
        yield (
            f"model.moe.experts={moe.experts} cannot be made of the {named} entries of "
            f"stage.experts by repeating them: name {moe.experts} or a divisor of it"
        )
    elif not 1 <= moe.top_k <= named:
        yield (
            f"model.moe.top_k is {moe.top_k}, it must be from 1 to {named}, the number of experts "
            f"that stage.experts names (model.moe.experts makes more of them)"
        )


def _parts(recipe: Recipe) -> Iterator[str]:
    """What a stage trains must be what it gives: all else would be lost."""
    stage = recipe.stage
    connectors = ["connectors", *(f"connector.{tower}" for tower in recipe.model.towers)]
    encoders = ["encoders", *(f"encoder.{tower}" for tower in recipe.model.towers)]
    given = {
        "base": ["embeddings", "norms", "attention", "mlp"],
        "align": [*connectors, *encoders],
        "expert": ["lora", "mlp", f"connector.{stage.expert}", f"encoder.{stage.expert}"],
        "moe": [
            "embeddings",
            "norms",
            "attention",
            "mlp",
            "router",
            "experts",
            "shared",
            "lora",
            *connectors,
            *encoders,
        ],
        "dense": ["embeddings", "norms", "attention", "mlp", "lora", *connectors, *encoders],
    }.get(stage.kind, stage.train)
    for part in stage.train:
        if part not in given:
            known = ", ".join(given)
            yield f"stage.train names {part!r}; parts of a {stage.kind} stage are {known}"
    targets = {
        "expert": ["mlp"],
        "moe": list(LORA_TARGETS),
        "dense": ["attention", "mlp"],
    }.get(stage.kind, [])
    for target in stage.lora.targets:
        if target in LORA_TARGETS and target not in targets:
            yield f"stage.lora.targets names {target}, which a {stage.kind} stage does not give"
    if not stage.train:
        yield "stage.train is empty, a stage must train something"
    if "lora" in stage.train and not stage.lora.targets:
        yield "stage.train names lora, but stage.lora.targets is empty"
    if stage.lora.targets and "lora" not in stage.train:
        yield "stage.lora.targets is given, but stage.train does not name lora"
    yield from rate_problems(stage)
    if stage.lora.merge and not (stage.kind in ("moe", "dense") and stage.lora.targets):
        yield (
            "stage.lora.merge=true is for a moe or dense stage with stage.lora.targets, leave it "
            "out"
        )
    if stage.lora.rank < 1:
        yield f"stage.lora.rank is {stage.lora.rank}, it must be at least 1"


def _language(language: LanguageConfig) -> Iterator[str]:
    for key in ("blocks", "hidden", "ffn", "heads", "kv_heads", "vocabulary", "max_tokens"):
        if getattr(language, key) < 1:
            yield f"model.language.{key} is {getattr(language, key)}, it must be at least 1"
            return
    if language.vocabulary < SMALLEST_VOCABULARY:
        yield (
            f"model.language.vocabulary is {language.vocabulary}, bytes and special tokens alone "
            f"need {SMALLEST_VOCABULARY}"
        )
    if not 0 <= language.unpadded_vocabulary <= language.vocabulary:
        yield (
            f"model.language.unpadded_vocabulary is {language.unpadded_vocabulary}, it must be "
            f"from 0 to model.language.vocabulary={language.vocabulary}"
        )
    yield from _rotary(language)
    if language.hidden % language.heads:
        yield (
            f"model.language.hidden={language.hidden} is not divisible by "
            f"model.language.heads={language.heads}"
        )
    if language.heads % language.kv_heads:
        yield (
            f"model.language.heads={language.heads} is not divisible by "
            f"model.language.kv_heads={language.kv_heads}"
        )


def _rotary(language: LanguageConfig) -> Iterator[str]:
    for key in ("rope_base", "rope_factor"):
        if not 0 < getattr(language, key) < math.inf:
            yield f"model.language.{key} is {getattr(language, key)}, it must be above 0"
    if language.rope_scaling == "llama3":
        if not 0 < language.rope_low_frequency < language.rope_high_frequency < math.inf:
            yield (
                f"model.language.rope_low_frequency={language.rope_low_frequency} is not between 0 "
                f"and model.language.rope_high_frequency={language.rope_high_frequency}"
            )
        if language.rope_original_tokens < 1:
            yield "model.language.rope_original_tokens is needed by rope_scaling=llama3"
    elif language.rope_scaling == "none" and language.rope_factor != 1:
        yield (
            f"model.language.rope_factor is {language.rope_factor}, but "
            "model.language.rope_scaling=none scales nothing"
        )


def _trainer(trainer: TrainerConfig) -> Iterator[str]:
    for key in ("steps", "checkpoint_every", "keep", "log_every"):
        if getattr(trainer, key) < 1:
            yield f"trainer.{key} is {getattr(trainer, key)}, it must be at least 1"
    for key in ("lr", "eps"):
        if not getattr(trainer, key) > 0:
            yield f"trainer.{key} is {getattr(trainer, key)}, it must be greater than 0"
    for key in ("warmup", "weight_decay", "clip", "min_lr", "threads", "keep_every"):
        if not getattr(trainer, key) >= 0:
            yield f"trainer.{key} is {getattr(trainer, key)}, it must not be negative"
    yield from _validation(trainer.validation)
    traced = trainer.profile.steps
    if traced and not (len(traced) == 2 and 1 <= traced[0] <= traced[1] <= trainer.steps):
        yield (
            f"trainer.profile.steps is {list(traced)}, it must be the first and the last step of a "
            f"stretch between 1 and trainer.steps={trainer.steps}, or empty"
        )
    if trainer.keep_every > 0 and trainer.keep_every % max(1, trainer.checkpoint_every):
        yield (
            f"trainer.keep_every={trainer.keep_every} is no multiple of "
            f"trainer.checkpoint_every={trainer.checkpoint_every}: there would be none to keep"
        )
    for name in trainer.resume_changes:
        if name not in CHANGEABLE:
            known = ", ".join(CHANGEABLE)
            yield f"trainer.resume_changes names {name!r}, it may name {known}"
    if len(trainer.betas) != 2 or not all(0 <= beta < 1 for beta in trainer.betas):
        yield f"trainer.betas is {list(trainer.betas)}, it must be two numbers from 0 to below 1"


def _validation(validation: ValidationConfig) -> Iterator[str]:
    for key in ("every", "most"):
        value = getattr(validation, key)
        if value < 0:
            yield f"trainer.validation.{key} is {value}, it must not be negative"
    if validation.give == "best" and not validation.every:
        yield "trainer.validation.give=best needs validations: set trainer.validation.every"


def _data(recipe: Recipe) -> Iterator[str]:
    data = recipe.data
    for key in ("tokens_per_microbatch", "pad_to", "prefetch", "cache_bytes"):
        if getattr(data, key) < 1:
            yield f"data.{key} is {getattr(data, key)}, it must be at least 1"
    for key in ("block", "window"):
        if getattr(data.shuffle, key) < 1:
            yield f"data.shuffle.{key} is {getattr(data.shuffle, key)}, it must be at least 1"
    for key in ("workers", "sample_tokens"):
        if getattr(data, key) < 0:
            yield f"data.{key} is {getattr(data, key)}, it must not be negative"
    if not data.sample_seconds > 0:
        yield f"data.sample_seconds is {data.sample_seconds}, it must be greater than 0"
    if not 0 <= data.quarantine_most <= 1:
        yield f"data.quarantine_most is {data.quarantine_most}, it must be from 0 to 1"
    if not data.costs:
        yield "data.costs is empty, it must be estimate or a file of measured costs"
    if not data.datasets:
        yield "data.datasets is empty, a run needs at least one dataset"
    yield from _mixture("data.", data.global_samples, data.temperature, data.datasets)
    yield from _combinations("data.", data.combinations)
    if data.deal == "sharded" and data.compose == "uniform":
        yield _UNIFORM_SHARDED.format(key="data.compose")
    yield from _changes(data)


_UNIFORM_SHARDED = (
    "{key}=uniform gives every step one combination, data.deal=sharded would leave all ranks but "
    "those that own it idle: choose data.deal=balanced"
)


def _mixture(
    prefix: str, samples: int | None, temperature: float | None, datasets: dict[str, float] | None
) -> Iterator[str]:
    if samples is not None and samples < 1:
        yield f"{prefix}global_samples is {samples}, it must be at least 1"
    if temperature is not None and not temperature >= 0:
        yield f"{prefix}temperature is {temperature}, it must not be negative"
    for name, factor in (datasets or {}).items():
        if not 0 < factor < math.inf:
            yield f"{prefix}datasets.{name} is {factor}, it must be greater than 0"


def _combinations(prefix: str, combinations: dict[str, float] | None) -> Iterator[str]:
    for name, factor in (combinations or {}).items():
        if not 0 <= factor < math.inf:
            yield f"{prefix}combinations.{name} is {factor}, it must not be negative"
        if name.split("+")[-1] != "text":
            yield f"{prefix}combinations names {name!r}; a combination is like image+text"


def _changes(data: DataConfig) -> Iterator[str]:
    steps = [change.step for change in data.changes]
    if steps != sorted(set(steps)) or any(step < 1 for step in steps):
        yield f"data.changes has steps {steps}, they must be ascending, from 1 on"
    for number, change in enumerate(data.changes):
        prefix = f"data.changes[{number}]."
        yield from _mixture(prefix, change.global_samples, change.temperature, change.datasets)
        yield from _combinations(prefix, change.combinations)
        if change.compose is not None and change.compose not in COMPOSITIONS:
            yield f"{prefix}compose is {change.compose!r}, not one of {', '.join(COMPOSITIONS)}"
        if change.compose == "uniform" and data.deal == "sharded":
            yield _UNIFORM_SHARDED.format(key=f"{prefix}compose")
        if change.datasets is not None and not change.datasets:
            yield f"{prefix}datasets is empty, a run needs at least one dataset"


def _tower(name: str, tower: TowerConfig) -> Iterator[str]:
    prefix = f"model.towers.{name}"
    if tower.frame_order not in FRAME_ORDERS:
        yield (
            f"{prefix}.frame_order is {tower.frame_order!r}, it must be one of "
            f"{', '.join(FRAME_ORDERS)}"
        )
    for key in ("resolution", "frames"):
        if getattr(tower.encoder, key) < 1:
            yield f"{prefix}.encoder.{key} is {getattr(tower.encoder, key)}, it must be at least 1"
    for key in ("stack", "max_tokens", "queries", "layers", "heads"):
        if getattr(tower.connector, key) < 1:
            value = getattr(tower.connector, key)
            yield f"{prefix}.connector.{key} is {value}, it must be at least 1"
    if not tower.encoder.max_seconds > 0:
        yield f"{prefix}.encoder.max_seconds is {tower.encoder.max_seconds}, it must be above 0"


def _experts(recipe: Recipe) -> Iterator[str]:
    language, parallel = recipe.model.language, recipe.parallel
    if recipe.stage.kind == "moe":
        experts = len(recipe.stage.experts)
        if experts % parallel.expert:
            yield (
                f"parallel.expert={parallel.expert} does not divide the {experts} experts of "
                f"stage.experts"
            )
        if recipe.trainer.evaluation.routing and parallel.tensor * parallel.pipeline > 1:
            yield (
                "trainer.evaluation.routing needs parallel.tensor=1 and parallel.pipeline=1 so "
                "far: set it to false"
            )
        if not moe_blocks(recipe.model.moe.placement, language.blocks):
            yield f"model.moe.placement={recipe.model.moe.placement} leaves no block with experts"
        if language.ffn % parallel.expert_tensor:
            yield (
                f"model.language.ffn={language.ffn} is not divisible by "
                f"parallel.expert_tensor={parallel.expert_tensor}"
            )
    else:
        for key in ("expert", "expert_tensor"):
            size = getattr(parallel, key)
            if size > 1:
                yield f"parallel.{key}={size}, but {recipe.stage.kind} stages have no experts"
    stages = parallel.pipeline * parallel.virtual_pipeline
    if language.blocks % stages:
        yield f"{language.blocks} blocks cannot be divided evenly over {stages} pipeline stages"
    for key in ("heads", "kv_heads", "ffn", "vocabulary"):
        if getattr(language, key) % parallel.tensor:
            yield (
                f"model.language.{key}={getattr(language, key)} is not divisible by "
                f"parallel.tensor={parallel.tensor}"
            )
    if recipe.data.pad_to % parallel.tensor:
        yield f"data.pad_to={recipe.data.pad_to} is not divisible by parallel.tensor"
