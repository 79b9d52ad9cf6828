"""Runs in one process of ``run_distributed``: folders of transformers beside its own reading."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from megatron.core.process_groups_config import ProcessGroupCollection
from safetensors.torch import save_file
from transformers import PreTrainedModel

from tests.checkpoints.cases_convert import batch_of, built
from tests.checkpoints.small_models import LLAMA3, ROWS, llava, model_of, saved
from unimoe_mcore.checkpoints.artefact import read_manifest
from unimoe_mcore.checkpoints.loading import begin_with, load_sources
from unimoe_mcore.checkpoints.sources import find_sources
from unimoe_mcore.checkpoints.starting import find_start
from unimoe_mcore.config.model import LanguageConfig, ModelConfig, MoEConfig
from unimoe_mcore.config.parallel import ParallelConfig
from unimoe_mcore.config.recipe import Recipe
from unimoe_mcore.config.towers import ConnectorConfig, EncoderConfig, TowerConfig
from unimoe_mcore.convert import convert
from unimoe_mcore.model.build import build_model
from unimoe_mcore.model.parts import train_only
from unimoe_mcore.model.unimoe import UniMoEModel
from unimoe_mcore.runtime import groups
from unimoe_mcore.runtime.capabilities import detect, transformer_flags

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
    words = theirs.config.get_text_config().vocab_size
    ids = torch.randint(8, words - 1, (LENGTH,), generator=torch.Generator().manual_seed(1))
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


def mixture(folder: Path, said: Mapping[str, str], parallel: ParallelConfig) -> UniMoEModel:
    """Our stage 3 of a converted Mixtral, by what the conversion said of the recipe."""
    language = LanguageConfig(**read_manifest(folder, "the base").language)
    moe = MoEConfig(**yaml.safe_load(said["model.moe"]))
    recipe = Recipe(model=ModelConfig(language, moe), parallel=parallel)
    recipe.stage.kind, recipe.stage.base = "moe", str(folder)
    named = yaml.safe_load(said["stage.experts"].replace("FOLDER", str(folder)))
    recipe.stage.experts, recipe.stage.train = named, ["router"]
    recipe.stage.init_from = said["stage.init_from"].replace("FOLDER", str(folder))
    sources = find_sources(recipe)
    collection = ProcessGroupCollection.use_mpu_process_groups()
    model = build_model(recipe, collection, {}, torch.float32, transformer_flags(detect()))
    load_sources(model, sources, recipe)
    train_only(model, recipe.stage)
    start = find_start(recipe, sources)
    assert start is not None
    begin_with([model], start)
    return model.eval()


def mixtral() -> PreTrainedModel:
    return model_of("mixtral", num_local_experts=4, num_experts_per_tok=2)


def fused(folder: Path, model: PreTrainedModel) -> Path:
    """The same with the names that transformers 5 has in memory."""
    saved(folder, model)
    save_file(model.state_dict(), folder / "model.safetensors")
    return folder


@torch.no_grad()
def compared_llava(place: Path) -> dict[str, Any]:
    """A LLaVA of transformers: its language model, and its projector as a stage's connector."""
    theirs = llava()
    source = saved(place / "source" / "llava", theirs)
    published, imported = convert(source, place / "llava", torch.float32)
    said = {
        key: value.replace("FOLDER", str(place / "llava"))
        for key, value in published.recipe.items()
    }
    language = LanguageConfig(**read_manifest(place / "llava", "the base").language)
    connector = ConnectorConfig(**yaml.safe_load(said["model.towers.image.connector"]))
    order = said["model.towers.image.frame_order"]
    encoder = EncoderConfig(name="random_image", feature_size=32)
    recipe = Recipe(
        model=ModelConfig(language, towers={"image": TowerConfig(encoder, connector, order)})
    )
    recipe.stage.kind, recipe.stage.base = "dense", str(place / "llava")
    recipe.stage.start = str(place / "llava" / "connector-image")
    recipe.stage.connectors = {"image": said["stage.connectors.image"]}
    recipe.paths.cache = str(place / "cache")
    sources = find_sources(recipe)
    collection = ProcessGroupCollection.use_mpu_process_groups()
    flags = transformer_flags(detect())
    model = build_model(recipe, collection, {"image": ROWS - 1}, torch.float32, flags)
    load_sources(model, sources, recipe)
    features = torch.randn(4, 32)
    connected = model.modality_submodules["image"].connect([features])
    expected = theirs.model.multi_modal_projector(features)
    return {
        "connector": (connected - expected).abs().max().item(),
        "skipped": list(imported.skipped.values()),
        **difference(theirs, built(place / "llava")),
    }


def hashes(folder: Path) -> list[str]:
    """Of a base and all that lies beside it."""
    return [
        json.loads(path.read_text())["hash"] for path in sorted(folder.glob("**/manifest.json"))
    ]


def one_process(folder: str) -> dict[str, Any]:
    """Every kind of Llama, and a Mixtral in both forms."""
    groups.initialise(ParallelConfig())
    place = Path(folder)
    found: dict[str, Any] = {}
    for name, (kind, changes) in CASES.items():
        theirs = model_of(kind, **changes)
        source = saved(place / "source" / name, theirs, pieces="several" in name)
        convert(source, place / name, torch.float32)
        found[name] = difference(theirs, built(place / name))
        found[name]["files"] = len(list(source.glob("*.safetensors")))
        if changes.get("rope_parameters"):
            plain = {
                "rope_type": "default",
                "rope_theta": changes["rope_parameters"]["rope_theta"],
            }
            found[name]["unscaled"] = difference(
                model_of(kind, rope_parameters=plain), built(place / name)
            )["difference"]
    theirs = mixtral()
    published, _ = convert(saved(place / "source" / "m", theirs), place / "m", torch.float32)
    ours = mixture(place / "m", published.recipe, ParallelConfig())
    found["mixtral"] = difference(theirs, ours)
    convert(fused(place / "source" / "fused", theirs), place / "fused", torch.float32)
    found["hashes"] = [hashes(place / "m"), hashes(place / "fused")]
    found["llava"] = compared_llava(place)
    return found


def two_processes(folder: str) -> dict[str, Any]:
    """A Mixtral whose experts are divided over two processes."""
    parallel = ParallelConfig(expert=2)
    groups.initialise(parallel)
    theirs, place = mixtral(), Path(folder)
    said: list[Any] = [None]
    if dist.get_rank() == 0:
        published, _ = convert(saved(place / "source", theirs), place / "ep", torch.float32)
        said = [dict(published.recipe)]
    dist.broadcast_object_list(said)
    return difference(theirs, mixture(place / "ep", said[0], parallel))


@torch.no_grad()
def tensor_ranks(folder: str) -> dict[str, float]:
    """Losses of a base whose rows, some of which only fill up, lie on two tensor ranks."""
    base = Path(folder) / "multi-head"
    groups.initialise(ParallelConfig(tensor=2, sequence_parallel=True))
    theirs = model_of(*CASES["multi-head"][:1], **CASES["multi-head"][1])
    ids = torch.randint(8, ROWS - 1, (LENGTH,), generator=torch.Generator().manual_seed(1))
    ours = built(base, ParallelConfig(tensor=2, sequence_parallel=True))
    losses = ours(batch_of(ids.tolist()))[0, : LENGTH - 1]
    logits = theirs(input_ids=ids[None]).logits[0, :-1]
    wanted = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
    rows = ours.language_model.embedding.word_embeddings.weight.shape[0]
    return {"losses": ((losses - wanted).abs().max() / wanted.abs().max()).item(), "rows": rows}
