"""Runs in one process of ``run_distributed``: folders of transformers beside its own reading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from tests.checkpoints.cases_convert import batch_of, built
from tests.checkpoints.small_models import LLAMA3, model_of, saved
from unimoe_mcore.config.parallel import ParallelConfig
from unimoe_mcore.convert import convert
from unimoe_mcore.model.unimoe import UniMoEModel
from unimoe_mcore.runtime import groups

LENGTH = 200
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "multi-head": ("llama", {"num_key_value_heads": 4}),
    "grouped, in several files": ("llama", {}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "llama3": ("llama", {"rope_parameters": LLAMA3}),
    "linear": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    ),
    "even vocabulary": ("llama", {"vocab_size": 320}),
    "mistral": ("mistral", {}),
}


@torch.no_grad()
def difference(theirs: PreTrainedModel, ours: UniMoEModel) -> dict[str, float]:
    """Largest difference of logits over a sequence, as a share of the largest logit."""
    words = theirs.config.vocab_size
    ids = torch.randint(8, words, (LENGTH,), generator=torch.Generator().manual_seed(1))
    expected = theirs(input_ids=ids[None]).logits[0]
    found = ours(batch_of(ids.tolist()), with_loss=False)[0]
    losses = ours(batch_of(ids.tolist()))[0, : LENGTH - 1]
    wanted = torch.nn.functional.cross_entropy(expected[:-1], ids[1:], reduction="none")
    return {
        "difference": ((found[:, :words] - expected).abs().max() / expected.abs().max()).item(),
        "deviation": expected.std().item(),
        "losses": (losses - wanted).abs().max().item() / wanted.abs().max().item(),
        "said": found[:, words:].max().item() if found.shape[1] > words else float("-inf"),
        "rows": found.shape[1],
    }


def all_cases(folder: str) -> dict[str, Any]:
    """Every kind of Llama."""
    groups.initialise(ParallelConfig())
    place = Path(folder)
    found: dict[str, Any] = {}
    for name, (kind, changes) in CASES.items():
        theirs = model_of(kind, **changes)
        source = saved(place / "source" / name, theirs, pieces="several" in name)
        convert(source, place / name, torch.float32)
        found[name] = difference(theirs, built(place / name))
        found[name]["files"] = len(list(source.glob("*.safetensors")))
    return found
