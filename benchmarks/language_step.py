"""One step of a sparse language model: by our engine, and by transformers' Mixtral.

``python -m benchmarks.language_step`` is a child of ``benchmarks.training_step``.
"""

from __future__ import annotations

from unimoe_mcore.runtime.devices import prepare_device

prepare_device()

import gc  # noqa: E402
import os  # noqa: E402
import statistics  # noqa: E402
import time  # noqa: E402
from collections.abc import Callable  # noqa: E402
from dataclasses import replace  # noqa: E402
from typing import Any  # noqa: E402

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from transformers import MixtralConfig, MixtralForCausalLM  # noqa: E402

from benchmarks.children import serve  # noqa: E402
from data_pipeline.conversation.template import Rendered  # noqa: E402
from data_pipeline.reading.collate import MicroBatch, collate  # noqa: E402
from data_pipeline.reading.sample import Sample  # noqa: E402
from unimoe_mcore.checkpoints.sources import Sources  # noqa: E402
from unimoe_mcore.config.model import LanguageConfig, ModelConfig, MoEConfig  # noqa: E402
from unimoe_mcore.config.parallel import ParallelConfig  # noqa: E402
from unimoe_mcore.config.recipe import Recipe  # noqa: E402
from unimoe_mcore.config.stage import StageConfig  # noqa: E402
from unimoe_mcore.config.trainer import TrainerConfig  # noqa: E402
from unimoe_mcore.model.initialise import initial_value  # noqa: E402
from unimoe_mcore.runtime import groups  # noqa: E402
from unimoe_mcore.runtime.capabilities import detect, transformer_flags  # noqa: E402
from unimoe_mcore.training.module import TrainModule  # noqa: E402
from unimoe_mcore.training.step import train_step  # noqa: E402

EXPERTS = 4
TRAINER = TrainerConfig(lr=1e-3, warmup=0, min_lr=1.0, precision="fp32")
BALANCE = 0.05
"""Coefficient of the balancing loss where experts are divided."""
TRIALS = 3
"""Steps by which Mixtral's way to compute experts is chosen, after one that is not counted."""
WAYS = ("eager", "grouped_mm")
"""Ways to compute Mixtral's experts. Of transformers' others one copies the weights of its experts
for every token (160 GB at SmolLM2's size), and two are CUDA kernels that are fetched from the Hub.
"""


def ids_of(vocabulary: int, sequences: int, length: int) -> Tensor:
    """Random token ids, the same in every process, ``[sequences, length]``."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary, (sequences, length), generator=generator)


class Ours:
    """The engine as a run has it: ``TrainModule`` and ``train_step``; each rank an equal share.

    Args:
        balanced: train with the balancing loss over the global batch, as who divides experts does.
    """

    def __init__(
        self, language: LanguageConfig, sequences: int, length: int, balanced: bool = False
    ) -> None:
        ranks = int(os.environ.get("WORLD_SIZE", "1"))
        moe = MoEConfig(placement="all")
        if balanced:
            moe = replace(moe, balance="global", balance_coefficient=BALANCE)
        recipe = Recipe(
            stage=StageConfig(
                kind="moe",
                experts=["base"] * EXPERTS,
                train=["embeddings", "norms", "attention", "router", "experts"],
            ),
            model=ModelConfig(language, moe),
            parallel=ParallelConfig(processes=ranks, expert=ranks),
            trainer=TRAINER,
        )
        collection = groups.initialise(recipe.parallel)
        flags = transformer_flags(detect())
        self.module = TrainModule(recipe, collection, {}, flags, Sources(), "fp32")
        ids = ids_of(language.vocabulary, sequences, length)
        self.batch = self._packed(ids.chunk(ranks)[dist.get_rank()])

    @staticmethod
    def _packed(ids: Tensor) -> MicroBatch:
        learn = [True] * ids.shape[1]
        samples = [
            Sample(str(number), "x", "text", Rendered(row.tolist(), learn))
            for number, row in enumerate(ids)
        ]
        return collate(samples, pad_id=0, multiple=64)

    def step(self, exact: bool = False, record: bool = False) -> dict[str, float]:
        """One packed row a rank.

        Args:
            exact: also give the gradient norm added up in fp64.
            record: also give how much more than their share the busier half of the experts gets.
        """
        norms: list[float] = []
        optimizer = self.module.optimizer
        measure = optimizer.get_grad_norm

        def measure_both() -> float:
            norms.append(self._norm())
            return float(measure())

        if exact:
            optimizer.get_grad_norm = measure_both
        result = train_step(self.module, [self.batch], TRAINER.router_every - 1 if record else 0)
        optimizer.get_grad_norm = measure
        total = result.sums.sum(0)
        found = {"loss": (total[0] / total[1]).item(), "norm": result.grad_norm}
        if record:
            halves = [(sum(load[: EXPERTS // 2]), sum(load[EXPERTS // 2 :]))
                      for load in result.routing["router/load"].values()]  # fmt: skip
            found["busier"] = statistics.mean(max(both) / sum(both) * 2 for both in halves)
        return found | ({"exact": norms[0]} if exact else {})

    def _norm(self) -> float:
        """Of all gradients of all ranks; experts are divided, all else is on every rank."""
        squares = torch.zeros(2, dtype=torch.float64)
        for parameter in self.module.chunks[0].parameters():
            divided = not getattr(parameter, "allreduce", True)
            squares[int(divided)] += parameter.main_grad.double().square().sum()
        experts = squares[1:]
        dist.all_reduce(experts)
        return float((squares[:1] + experts).sqrt())


class Mixtral:
    """Transformers' model with sdpa attention, torch's fused AdamW and torch's clipping."""

    def __init__(self, language: LanguageConfig, sequences: int, length: int) -> None:
        self.model = MixtralForCausalLM(
            MixtralConfig(
                vocab_size=language.vocabulary,
                hidden_size=language.hidden,
                intermediate_size=language.ffn,
                num_hidden_layers=language.blocks,
                num_attention_heads=language.heads,
                num_key_value_heads=language.kv_heads,
                max_position_embeddings=language.max_tokens,
                rms_norm_eps=language.norm_eps,
                rope_parameters={"rope_type": "default", "rope_theta": float(language.rope_base)},
                tie_word_embeddings=language.tied,
                num_local_experts=EXPERTS,
                num_experts_per_tok=2,
                sliding_window=None,
                use_cache=False,
                attn_implementation="sdpa",  # type: ignore[call-arg]
            )
        ).train()
        self._fill(language)
        decayed = [p for p in self.model.parameters() if p.dim() > 1]
        plain = [p for p in self.model.parameters() if p.dim() <= 1]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": TRAINER.weight_decay},
                {"params": plain, "weight_decay": 0.0},
            ],
            lr=TRAINER.lr,
            betas=(TRAINER.betas[0], TRAINER.betas[1]),
            eps=TRAINER.eps,
            fused=True,
        )
        self.ids = ids_of(language.vocabulary, sequences, length)

    @torch.no_grad()
    def _fill(self, language: LanguageConfig) -> None:
        """The weights that our engine initialises itself with, by their names on disk."""

        def ours(name: str, *shape: int) -> Tensor:
            return initial_value(f"language_model.{name}", shape, TRAINER.seed, language)

        hidden, ffn = language.hidden, language.ffn
        head, each = hidden // language.heads, language.heads // language.kv_heads
        inner = self.model.model
        inner.embed_tokens.weight.copy_(
            ours("embedding.word_embeddings.weight", language.vocabulary, hidden)
        )
        for block, layer in enumerate(inner.layers):
            attention, mlp = (f"decoder.layers.{2 * block + i}." for i in range(2))
            rows = (language.heads + 2 * language.kv_heads) * head
            fused = ours(f"{attention}self_attention.linear_qkv.weight", rows, hidden)
            # Megatron's order: for each group its query heads, then its key, then its value.
            parts = fused.view(language.kv_heads, each + 2, head, hidden).split((each, 1, 1), 1)
            projections = (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)
            for projection, part in zip(projections, parts, strict=True):
                projection.weight.copy_(part.reshape(-1, hidden))
            layer.self_attn.o_proj.weight.copy_(
                ours(f"{attention}self_attention.linear_proj.weight", hidden, hidden)
            )
            layer.mlp.gate.weight.copy_(ours(f"{mlp}mlp.router.weight", EXPERTS, hidden))
            experts = f"{mlp}mlp.experts.experts.linear_"
            layer.mlp.experts.gate_up_proj.copy_(
                ours(f"{experts}fc1.weight", EXPERTS, 2 * ffn, hidden)
            )
            layer.mlp.experts.down_proj.copy_(ours(f"{experts}fc2.weight", EXPERTS, hidden, ffn))

    def step(self, exact: bool = False) -> dict[str, float]:
        """All sequences as one batch, without padding.

        Args:
            exact: also give the gradient norm added up in fp64.
        """
        self.optimizer.zero_grad()
        loss = self.model(input_ids=self.ids, labels=self.ids).loss
        loss.backward()
        squares = 0.0
        if exact:
            given = (p.grad for p in self.model.parameters() if p.grad is not None)
            squares = sum(float(gradient.double().square().sum()) for gradient in given)
        norm = nn.utils.clip_grad_norm_(
            self.model.parameters(), TRAINER.clip, error_if_nonfinite=True
        )
        self.optimizer.step()
        found = {"loss": loss.item(), "norm": norm.item()}
        return found | ({"exact": squares**0.5} if exact else {})

    def choose(self) -> dict[str, Any]:
        """Try every way to compute experts, and keep the fastest.

        Returns:
            ``chosen``, and for each way its median seconds.
        """
        tried: dict[str, float] = {}
        for name in WAYS:
            self.model.config._experts_implementation = name
            self.step()
            tried[name] = statistics.median(timed(self.step)["seconds"] for _ in range(TRIALS))
        chosen = min(tried, key=tried.__getitem__)
        self.model.config._experts_implementation = chosen
        return {"chosen": chosen, "tried": tried}


def timed(step: Callable[..., dict[str, float]], **options: Any) -> dict[str, float]:
    """One step with its seconds by the clock and by the processor."""
    gc.collect()  # garbage of the step before is not this one's
    began, before = time.perf_counter(), time.process_time()
    found = step(**options)
    found["seconds"] = time.perf_counter() - began
    found["cpu"] = time.process_time() - before
    return found


SIDES = {"ours": Ours, "mixtral": Mixtral}


def main() -> None:
    sides: list[Any] = []

    def build(side: str, language: dict[str, Any], **shape: Any) -> dict[str, Any]:
        sides[:] = [SIDES[side](LanguageConfig(**language), **shape)]
        return {}

    serve(
        {
            "build": build,
            "step": lambda **options: timed(sides[0].step, **options),
            "choose": lambda: sides[0].choose(),
        }
    )
    groups.destroy()


if __name__ == "__main__":
    main()
