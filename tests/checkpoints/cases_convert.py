"""Runs in one process of ``run_distributed``: a converted base beside transformers' own reading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from data_pipeline.conversation.template import Rendered, render
from data_pipeline.conversation.tokenizer import TextTokenizer
from data_pipeline.reading.collate import MicroBatch, Sample, collate
from tests.checkpoints.small_gguf import small, write
from unimoe_mcore.checkpoints.artefact import TOKENIZER, read_manifest
from unimoe_mcore.checkpoints.pieces import sharded_tensors
from unimoe_mcore.checkpoints.store import ShardReader
from unimoe_mcore.config.model import LanguageConfig, ModelConfig
from unimoe_mcore.config.parallel import ParallelConfig
from unimoe_mcore.config.recipe import Recipe
from unimoe_mcore.convert import convert
from unimoe_mcore.model.build import build_model
from unimoe_mcore.model.unimoe import UniMoEModel
from unimoe_mcore.runtime import groups
from unimoe_mcore.runtime.capabilities import detect, transformer_flags

WORDS = 32
"""Tokens that are said greedily."""


def theirs(path: Path) -> LlamaForCausalLM:
    """Transformers' model of a GGUF file, fp32."""
    dummy = LlamaForCausalLM(_config(load_gguf_checkpoint(str(path))["config"]))
    state = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=dummy)["tensors"]
    left_out = dummy.load_state_dict(state, strict=False)
    assert not left_out.unexpected_keys, left_out
    assert set(left_out.missing_keys) <= {"lm_head.weight"}, left_out  # tied
    dummy.tie_weights()
    return dummy.float().eval()


def _config(facts: dict[str, Any]) -> LlamaConfig:
    return LlamaConfig(**facts, attn_implementation="eager")


def built(folder: Path, parallel: ParallelConfig | None = None) -> UniMoEModel:
    """Our model of a base folder, fp32, in a layout."""
    language = LanguageConfig(**read_manifest(folder, "the base").language)
    recipe = Recipe(model=ModelConfig(language), parallel=parallel or ParallelConfig())
    recipe.stage.kind = "base"
    collection = ProcessGroupCollection.use_mpu_process_groups()
    model = build_model(recipe, collection, {}, torch.float32, transformer_flags(detect()))
    reader = ShardReader(folder)
    for tensor in sharded_tensors(model.sharded_state_dict()):
        reader.fill(tensor)
    return model.eval()


def batch_of(ids: list[int]) -> MicroBatch:
    """One sequence whose every token has logits, and one more token, so that the last has too."""
    sample = Sample("x", "x", "text", Rendered([*ids, 0], [True] * (len(ids) + 1)))
    return collate([sample], pad_id=0, multiple=8)


def logits_of(model: UniMoEModel, ids: list[int]) -> Tensor:
    return model(batch_of(ids), with_loss=False)[0]


@torch.no_grad()
def compared(source: Path, base: Path, question: str) -> dict[str, Any]:
    """Convert a GGUF file in fp32; logits along what transformers' model says greedily.

    Where ours finds the same token the likeliest at every place, it would say the same.
    """
    tokenizer = convert(source, base, torch.float32)[0].tokenizer
    ids = render([{"from": "human", "value": question}], tokenizer, {}).ids
    other, mine = theirs(source), built(base)
    other.generation_config.eos_token_id = other.config.eos_token_id = None  # 32 tokens, always
    settings = GenerationConfig(max_new_tokens=WORDS, do_sample=False, pad_token_id=tokenizer.pad)
    said = other.generate(torch.tensor([ids]), settings)[0].tolist()
    expected = other(input_ids=torch.tensor([said])).logits[0]
    found = logits_of(mine, said)
    return {
        "difference": ((found - expected).abs().max() / expected.abs().max()).item(),
        "deviation": expected.std().item(),
        "ours": found[len(ids) - 1 : -1].argmax(-1).tolist(),
        "theirs": said[len(ids) :],
        "said": TextTokenizer.load(base / TOKENIZER).decode(said[len(ids) :]),
        "parameters": sum(p.numel() for p in mine.parameters()),
    }


def all_cases(folder: str, published: str) -> dict[str, Any]:
    """A small random model with a tied and an untied head, and a published one if there is."""
    groups.initialise(ParallelConfig())
    place = Path(folder)
    found = {}
    for name, tied in (("tied", True), ("untied", False)):
        write(place / f"{name}.gguf", *small(tied))
        found[name] = compared(place / f"{name}.gguf", place / name, "the end")
    if published:
        question = "What is the capital of France?"
        found["published"] = compared(Path(published), place / "published", question)
    return found
