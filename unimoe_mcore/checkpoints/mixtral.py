"""Mixtral: a mixture as a base, an artefact per expert, and one for the routers.

The base's own MLP is the first expert, so that it is a model by itself; the other experts stand on
it like those of stage 2. With ``stage.experts`` listing all of them and ``stage.init_from`` the
routers', stage 3 begins with Mixtral itself: the same experts, chosen in the same way (softmax over
the chosen logits).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial

from torch import Tensor

from unimoe_mcore.checkpoints.deferred import Deferred
from unimoe_mcore.checkpoints.facts import Facts, size
from unimoe_mcore.checkpoints.llama import EXPERT, ROUTER, Rule, of_blocks, rules_of
from unimoe_mcore.checkpoints.published import Part
from unimoe_mcore.config.model import LanguageConfig
from unimoe_mcore.config.stage import OWN_MLP

_FUSED = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.(gate_up_proj|down_proj)")
MOST_EXPERTS = 1024


def expert_folder(expert: int) -> str:
    """Name of an expert's folder in the base's."""
    return f"expert-{expert}"


ROUTERS = "router"
"""Name of the routers' folder in the base's."""


def mixture_of(language: LanguageConfig, facts: Facts) -> tuple[list[Part], dict[str, str]]:
    """What lies beside a Mixtral's base, and what a recipe of stage 3 must say of it.

    Args:
        facts: its ``config.json``.

    Raises:
        ValueError: if that says no number of experts.
    """
    experts, chosen = size(facts, "num_local_experts"), size(facts, "num_experts_per_tok")
    if not 2 <= experts <= MOST_EXPERTS or chosen > experts:
        raise ValueError(f"it chooses {chosen} of {experts} experts, which cannot be built here")
    parts = [
        Part(expert_folder(e), "expert", of_blocks(EXPERT, language, expert=e))
        for e in range(1, experts)
    ]
    parts.append(Part(ROUTERS, "moe", of_blocks(ROUTER, language)))
    listed = ", ".join([OWN_MLP, *(f"FOLDER/{expert_folder(e)}" for e in range(1, experts))])
    return parts, {
        "model.moe": f"{{placement: all, top_k: {chosen}, score: softmax}}",
        "stage.experts": f"[{listed}]",
        "stage.init_from": f"FOLDER/{ROUTERS}",
    }


def first_expert(language: LanguageConfig) -> list[Rule]:
    """The base's rules: its MLP is the first expert."""
    return rules_of(language, EXPERT, expert=0)


def separated(tensors: Mapping[str, Deferred]) -> dict[str, Deferred]:
    """Experts that lie fused in one tensor a block, as transformers 5 has them, one by one.

    ``gate_up_proj`` is ``[experts, 2 * ffn, hidden]``, the gate above; ``down_proj`` is
    ``[experts, hidden, ffn]``.
    """
    found: dict[str, Deferred] = {}
    for name, tensor in tensors.items():
        fused = _FUSED.fullmatch(name)
        if fused is None or len(tensor.shape) != 3:
            found[name] = tensor
            continue
        rows = tensor.shape[1]
        cuts = {"w2": (0, rows)}
        if fused[2] == "gate_up_proj":
            cuts = {"w1": (0, rows // 2), "w3": (rows // 2, rows)}
        for expert in range(min(tensor.shape[0], MOST_EXPERTS)):
            for short, (start, stop) in cuts.items():
                place = f"model.layers.{fused[1]}.block_sparse_moe.experts.{expert}.{short}.weight"
                found[place] = Deferred(
                    (stop - start, tensor.shape[2]),
                    partial(_rows, tensor, expert, start, stop),
                    tensor.floating,
                )
    return found


def _rows(tensor: Deferred, expert: int, start: int, stop: int) -> Tensor:
    """Rows of one expert; where the file is mapped, no others are read."""
    return tensor.read()[expert, start:stop]
