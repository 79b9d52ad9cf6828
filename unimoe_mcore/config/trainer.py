"""How a run is trained, logged, saved and judged."""

from __future__ import annotations

from dataclasses import dataclass, field

PRECISIONS = ("auto", "bf16", "fp32")
SPLITS = ("val", "test")
RECOMPUTE = ("none", "selective", "full")
TRACED_RANKS = ("first", "all")
GIVES = ("last", "best")


@dataclass
class ProfileConfig:
    """A trace of a few steps, for a browser, and a table of what took the time.

    Attributes:
        steps: the first and the last step that are traced, counted from 1 as in the log; empty
            for no trace.
        ranks: ``first`` or ``all``.
    """

    steps: list[int] = field(default_factory=list)
    ranks: str = "first"


CHANGEABLE = (
    "steps",
    "lr",
    "min_lr",
    "warmup",
    "weight_decay",
    "betas",
    "eps",
    "clip",
    "validation.give",
)
"""What ``resume_changes`` may name: settings that need nothing of a checkpoint to be other ones."""


@dataclass
class EvaluationConfig:
    """Held-out questions.

    Attributes:
        split: ``val`` to choose settings, ``test`` to report.
        before: also judge the model before the first step.
        after: judge the model after the last step.
        routing: also record which experts the held-out tokens go to (stage 3; needs whole rows
            and all layers on every rank, so neither tensor nor pipeline parallelism).
    """

    split: str = "test"
    before: bool = False
    after: bool = True
    routing: bool = True


@dataclass
class ValidationConfig:
    """Held-out loss while a run trains; the checkpoint with the lowest one is kept.

    Attributes:
        every: steps between two validations; there is also one after the last step. 0 for none.
        split: whose questions are asked.
        most: questions of every dataset, spread evenly over it; 0 for all.
        give: which weights the run is judged by and gives to later stages: those of its ``last``
            step, or of its ``best`` checkpoint.
    """

    every: int = 0
    split: str = "val"
    most: int = 32
    give: str = "last"


@dataclass
class TrainerConfig:
    """Optimisation (AdamW, cosine with linear warm-up), precision, checkpoints.

    Attributes:
        steps: optimizer steps.
        lr: highest learning rate.
        min_lr: lowest learning rate as a fraction of ``lr``, reached at the last step.
        warmup: steps of linear warm-up.
        weight_decay: AdamW's.
        betas: AdamW's.
        eps: AdamW's.
        clip: largest gradient norm; 0 does not clip.
        precision: ``bf16`` (bf16 weights and activations, fp32 main weights and gradients),
            ``fp32``, or ``auto``: whichever this machine is fast in.
        seed: of every weight that the run itself initialises.
        checkpoint_every: steps between checkpoints; one is also written after the last step.
        keep: newest checkpoints that are kept.
        keep_every: steps between those that are kept for good, besides the newest; 0 keeps none.
        resume_changes: settings that this run may change when it is continued (``lr``, ``steps``
            ...: ``CHANGEABLE``). All others that change what is computed are refused.
        log_every: steps between the lines printed where there is no terminal.
        router_every: steps between records of what the routers do (stage 3); 0 for none.
        threads: CPU threads per process; 0 takes ``OMP_NUM_THREADS``, or 1.
        recompute: what the backward pass computes again instead of keeping it: ``none``,
            ``selective`` (attention's scores, whose memory grows with the square of a sequence),
            ``full`` (every block from its input: least memory, a third more computation).
    """

    steps: int = 300
    lr: float = 1e-3
    min_lr: float = 0.05
    warmup: int = 30
    weight_decay: float = 0.02
    betas: list[float] = field(default_factory=lambda: [0.9, 0.98])
    eps: float = 1e-8
    clip: float = 1.0
    precision: str = "auto"
    seed: int = 0
    checkpoint_every: int = 100
    keep: int = 2
    keep_every: int = 0
    resume_changes: list[str] = field(default_factory=list)
    log_every: int = 20
    router_every: int = 10
    threads: int = 0
    recompute: str = "none"
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)


WANDB_MODES = ("auto", "offline", "online")


@dataclass
class WandbConfig:
    """A mirror at wandb.

    Attributes:
        enabled: whether there is one.
        mode: ``online``, ``offline`` (``wandb sync`` uploads it later), or ``auto``: what
            ``WANDB_MODE`` says, else ``online`` where there is an API key, else ``offline``.
        project: wandb's project.
        entity: whose project; empty for the default of the account.
    """

    enabled: bool = False
    mode: str = "auto"
    project: str = "unimoe"
    entity: str = ""


@dataclass
class TensorBoardConfig:
    """A mirror in TensorBoard's event files.

    Attributes:
        enabled: whether there is one.
    """

    enabled: bool = False


@dataclass
class LoggingConfig:
    """Mirrors of the run directory; they may fail without harm (``training/mirrors.py``).

    Attributes:
        wandb: one at wandb.
        tensorboard: one for TensorBoard.
    """

    wandb: WandbConfig = field(default_factory=WandbConfig)
    tensorboard: TensorBoardConfig = field(default_factory=TensorBoardConfig)


@dataclass
class PathsConfig:
    """Where things are.

    Attributes:
        runs: run directories.
        data: built data sets.
        cache: features of frozen encoders, token lengths; may be deleted at any time.
        packages: downloaded Debian packages.
        scratch: a folder on the machine itself, for copies of remote shards; may be deleted at
            any time.
    """

    runs: str = "runs"
    data: str = "data"
    cache: str = "cache"
    packages: str = "cache/packages"
    scratch: str = "cache/shards"
