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
        vocabulary: tokens, special ones included.
        max_tokens: longest sequence.
        rope_base: base of the rotary positions.
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
    rope_base: int = 10000
    norm_eps: float = 1e-5
    tied: bool = True
    init_std: float = 0.02


@dataclass
class MoEConfig:
    """Where the experts are and how tokens reach them.

    Attributes:
        placement: ``interval`` (every second block from the first: 0, 2, 4 ..., Uni-MoE's),
            ``all``, ``first_half``, ``second_half`` (the paper's Table 7 d).
        top_k: experts per token; logits of the chosen ones go through a softmax in fp32.
    """

    placement: str = "interval"
    top_k: int = 2


@dataclass
class LoRAConfig:
    """Low-rank adapters (Hu et al. 2021, eq. 3): ``W x + alpha / rank * B A x`` with B = 0 first.

    Attributes:
        targets: any of ``attention`` (q, k, v, output), ``mlp`` (dense blocks), ``experts``;
            empty for no LoRA.
        rank: rank of the product.
        alpha: scale; the product is multiplied by ``alpha / rank``.
        merge: for a ``moe`` stage: give the adapted weights with the adapters added, in place of
            the adapters. (An ``expert`` stage always does.)
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


PLACEMENTS = ("interval", "all", "first_half", "second_half")


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
