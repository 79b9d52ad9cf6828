"""The model's shape: language model, experts, LoRA, towers."""

from __future__ import annotations

from dataclasses import dataclass, field

from unimoe_mcore.config.towers import TowerConfig


@dataclass
class LanguageConfig:
    """A Llama-shaped decoder: RMSNorm, RoPE, SwiGLU, no biases.

    Attributes:
        blocks: transformer blocks (attention + MLP); Megatron's HybridModel counts two layers a
            block.
        hidden: width.
        ffn: width inside the gated MLP.
        heads: attention heads.
        kv_heads: key/value heads (``heads`` for multi-head attention).
        vocabulary: rows of the embedding; tokens, special ones included, and what fills up.
        unpadded_vocabulary: rows that are a published model's own; those behind them, which make
            the number even for tensor parallelism or hold the media's markers, are never said. 0:
            all are its own.
        max_tokens: longest sequence.
        rope_base: base of the rotary positions.
        rope_scaling: how they are stretched for longer sequences (``unimoe_mcore.model.rotary``):
            ``none``, ``linear``, ``llama3``.
        rope_factor: by how much.
        rope_low_frequency, rope_high_frequency, rope_original_tokens: of ``llama3``.
        norm_eps: epsilon of RMSNorm.
        tied: output layer shares the embedding's weights.
        init_std: standard deviation of the initial weights; output layers get
            ``init_std / sqrt(2 * blocks)``.
    """

    blocks: int = 4
    hidden: int = 256
    ffn: int = 672
    heads: int = 4
    kv_heads: int = 4
    vocabulary: int = 2048
    max_tokens: int = 512
    unpadded_vocabulary: int = 0
    rope_base: float = 10000
    rope_scaling: str = "none"
    rope_factor: float = 1.0
    rope_low_frequency: float = 1.0
    rope_high_frequency: float = 4.0
    rope_original_tokens: int = 0
    norm_eps: float = 1e-5
    tied: bool = True
    init_std: float = 0.02

    @property
    def words(self) -> int:
        """Rows of the embedding that are the model's own."""
        return self.unpadded_vocabulary or self.vocabulary


@dataclass
class MoEConfig:
    """Where the experts are and how tokens reach them (``docs/training.md``, The router).

    Attributes:
        experts: experts of a block, made of ``stage.experts`` by naming its entries over and over
            in their order; 0 for as many as there are entries.
        placement: ``interval`` (every second block from the first: 0, 2, 4 ..., Uni-MoE's),
            ``all``, ``first_half``, ``second_half`` (the paper's Table 7 d).
        top_k: experts per token.
        score: ``softmax`` (over the logits of the chosen experts: the official code),
            ``pre_softmax`` (over all logits, the chosen ones not renormalised: the paper,
            eq. 16-17), ``sigmoid`` (of each logit, the chosen ones renormalised); all in fp32.
        balance: ``none`` (Uni-MoE with four experts), ``official``, ``sequence``, ``global``,
            ``global_running``, ``bias`` (``unimoe_mcore.model.balance``).
        balance_coefficient: of the balancing loss, a mean over all tokens of the global batch.
        balance_until: step at which the coefficient, changed linearly from the first step on,
            reaches ``balance_final``; 0 keeps it.
        balance_final: see there.
        bias_rate: of ``balance=bias``: what a step adds to an expert's bias, or takes from it.
        z_loss: coefficient of the mean of the squared log-sum-exp of the logits (ST-MoE 2022,
            eq. 5); 0 for none.
        router_warmup: steps in which experts and the adapters on them stay as they are, so that
            the router first learns what they are good for.
        capacity: most tokens of an expert in a micro-batch in training, as a multiple of its even
            share; what is over, the least probable first, is not sent to it. 0: no limit.
        jitter: in training the router's input is multiplied by numbers from
            ``[1 - jitter, 1 + jitter]`` (Switch 2021).
    """

    experts: int = 0
    placement: str = "interval"
    top_k: int = 2
    score: str = "softmax"
    balance: str = "none"
    balance_coefficient: float = 0.01
    balance_until: int = 0
    balance_final: float = 0.0
    bias_rate: float = 1e-3
    z_loss: float = 0.0
    router_warmup: int = 0
    capacity: float = 0.0
    jitter: float = 0.0


@dataclass
class LoRAConfig:
    """Low-rank adapters (Hu et al. 2021, eq. 3): ``W x + alpha / rank * B A x`` with B = 0 first.

    Attributes:
        targets: any of ``attention`` (q, k, v, output), ``mlp`` (dense blocks), ``experts``;
            empty for no LoRA.
        rank: rank of the product.
        alpha: scale; the product is multiplied by ``alpha / rank``.
        merge: for a ``moe`` or ``dense`` stage: give the adapted weights with the adapters added,
            in place of the adapters. (An ``expert`` stage always does.)
    """

    targets: list[str] = field(default_factory=list)
    rank: int = 8
    alpha: float = 16.0
    merge: bool = False


@dataclass
class ModelConfig:
    """Language model, experts' placement, and a tower per name.

    The tower called ``image`` also takes video.
    """

    language: LanguageConfig = field(default_factory=LanguageConfig)
    moe: MoEConfig = field(default_factory=MoEConfig)
    towers: dict[str, TowerConfig] = field(default_factory=dict)


ROPE_SCALINGS = ("none", "linear", "llama3")
PLACEMENTS = ("interval", "all", "first_half", "second_half")
SCORES = ("softmax", "pre_softmax", "sigmoid")
BALANCING_LOSSES = ("official", "sequence", "global", "global_running")
BALANCES = ("none", *BALANCING_LOSSES, "bias")


def moe_blocks(placement: str, blocks: int) -> list[int]:
    """Numbers of the blocks whose MLP is a mixture of experts (paper, Table 7 d)."""
    half = blocks // 2
    return {
        "interval": list(range(0, blocks, 2)),
        "all": list(range(blocks)),
        "first_half": list(range(half)),
        "second_half": list(range(half, blocks)),
    }[placement]


def layer_pattern(language: LanguageConfig, moe: MoEConfig, experts: int) -> str:
    """HybridModel's layer pattern: ``*-`` is a dense block, ``*E`` a block with experts.

    Pipeline boundaries are not part of it: they follow from the layout
    (``unimoe_mcore.model.language``), because a stored ``|`` at the wrong pipeline size makes
    Megatron build only the first segment without a word.
    """
    sparse = moe_blocks(moe.placement, language.blocks) if experts else []
    return "".join("*E" if block in sparse else "*-" for block in range(language.blocks))
