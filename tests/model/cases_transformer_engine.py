"""Layers of Transformer Engine's modules (``tests/model/as_if_te.py``) beside local ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.models.hybrid import hybrid_block
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from torch import Tensor

from tests.model.cases_language import batch_of, language, relative
from unimoe_mcore.checkpoints.artefact import Manifest
from unimoe_mcore.checkpoints.giving import _given
from unimoe_mcore.checkpoints.loading import load_sources
from unimoe_mcore.checkpoints.pieces import sharded_tensors
from unimoe_mcore.checkpoints.shard_file import HostCopy
from unimoe_mcore.checkpoints.sources import Sources
from unimoe_mcore.checkpoints.starting import Start
from unimoe_mcore.checkpoints.store import ShardReader, write_shards
from unimoe_mcore.checkpoints.trained import checkpoint_pieces, load_pieces
from unimoe_mcore.config.model import LoRAConfig, ModelConfig, MoEConfig
from unimoe_mcore.config.parallel import ParallelConfig
from unimoe_mcore.config.recipe import Recipe
from unimoe_mcore.config.stage import StageConfig
from unimoe_mcore.config.trainer import TrainerConfig
from unimoe_mcore.model import layers
from unimoe_mcore.model.build import build_model
from unimoe_mcore.model.initialise import name_seed
from unimoe_mcore.model.lora import add_lora
from unimoe_mcore.model.names import canonical
from unimoe_mcore.model.parts import part_of
from unimoe_mcore.model.unimoe import UniMoEModel
from unimoe_mcore.runtime import groups, without_te
from unimoe_mcore.runtime.capabilities import detect, transformer_flags
from unimoe_mcore.runtime.imagined import imagined
from unimoe_mcore.training.inventory import as_json
from unimoe_mcore.training.module import TrainModule
from unimoe_mcore.training.step import train_step

SHAPE = language()
WHOLE = ["embeddings", "norms", "attention", "mlp"]
TE, LOCAL = "transformer_engine", "local"
MARKS = ("allreduce", "sequence_parallel", "tensor_model_parallel", "partition_dim")


def recipe(
    experts: int = 0, adapted: tuple[str, ...] = (), shared: bool = False, **layout: Any
) -> Recipe:
    """A recipe that trains the whole language model, its adapters instead of what they adapt."""
    train = [part for part in WHOLE if part not in adapted]
    train += ["lora"] if adapted else []
    if experts:
        train += ["router"] + ["experts"] * ("experts" not in adapted)
    return Recipe(
        stage=StageConfig(
            kind="moe" if experts else "base",
            experts=["base"] * experts,
            shared_expert="base" if shared else "",
            train=train,
            lora=LoRAConfig(targets=list(adapted), rank=3, alpha=6),
        ),
        model=ModelConfig(SHAPE, MoEConfig(placement="interval")),
        parallel=ParallelConfig(**layout),
        trainer=TrainerConfig(steps=10, lr=1e-2, warmup=0),
    )


CASES: dict[str, dict[str, Any]] = {
    "dense": {},
    "dense, adapters on mlp": {"adapted": ("mlp",)},
    "experts": {"experts": 4},
    "experts, adapters on attention": {"experts": 4, "adapted": ("attention",)},
    "experts, adapters everywhere": {
        "experts": 4,
        "adapted": ("attention", "mlp", "experts"),
        "shared": True,
    },
}
LAYOUT = {"tensor": 2, "sequence_parallel": True, "pipeline": 2}
EXPERT_LAYOUTS = ({"expert": 4}, {"expert": 2, "expert_tensor": 2})
RANKS, RANK = 8, 5


@contextmanager
def of(modules: str) -> Iterator[dict[str, Any]]:
    """Megatron's flags for one kind of modules; while entered, the final norm is of that kind."""
    flags = transformer_flags(detect())
    assert flags["transformer_impl"] == TE
    with pytest.MonkeyPatch.context() as patch:
        if modules == LOCAL:
            patch.setattr(hybrid_block, "TENorm", WrappedTorchNorm)
            flags |= {"transformer_impl": LOCAL, "moe_grouped_gemm": False}
        yield flags


def built(modules: str, recipe: Recipe, collection: Any = None, **options: Any) -> UniMoEModel:
    collection = collection or ProcessGroupCollection.use_mpu_process_groups()
    with of(modules) as flags:
        return build_model(recipe, collection, {}, torch.float32, flags, **options)


def stored(model: UniMoEModel) -> dict[str, tuple[Any, ...]]:
    """What a rank has of every tensor on disk."""
    return {
        f"{tensor.key} {tuple(tensor.global_offset)}": (
            tuple(tensor.global_shape),
            tuple(tensor.local_shape),
            tuple(tensor.replica_id),
        )
        for tensor in sharded_tensors(model.sharded_state_dict())
    }


def named(model: UniMoEModel) -> dict[str, Tensor]:
    """Parameters by canonical name."""
    found = {canonical(name): parameter for name, parameter in model.named_parameters()}
    assert len(found) == len(list(model.named_parameters()))
    return found


def kinds(model: UniMoEModel) -> dict[str, int]:
    """How many modules there are of every kind that a spec names."""
    words = ("Linear", "Norm", "MLP", "Attention")
    names = [type(module).__name__ for module in model.language_model.decoder.modules()]
    return dict(Counter(name for name in names if name.endswith(words)))


def marks(model: UniMoEModel) -> dict[str, dict[str, Any]]:
    """What Megatron reads off every parameter, with what it takes for no mark.

    ``partition_dim`` counts only where a tensor is divided.
    """
    found = {}
    for name, parameter in named(model).items():
        mine = {mark: getattr(parameter, mark, mark == "allreduce") for mark in MARKS}
        if not mine["tensor_model_parallel"]:
            del mine["partition_dim"]
        found[name] = mine
    return found


def differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Keys that only one has, and keys under which they differ."""
    return sorted(k for k in one.keys() | other.keys() if one.get(k) != other.get(k))


def beside(case: str, folder: Path) -> dict[str, Any]:
    """One recipe with both kinds of modules: names, files, results."""
    asked = recipe(**CASES[case])
    ours, theirs = built(LOCAL, asked), built(TE, asked)
    load_sources(ours, Sources(), asked)
    generator = torch.Generator()
    with torch.no_grad():
        for name, parameter in named(ours).items():
            if ".lora_b." in name or "norm" in name:  # else zero or one, whichever is read
                generator.manual_seed(name_seed(0, name))
                parameter.add_(torch.randn(parameter.shape, generator=generator) / 10)
    write(ours, folder / "ours")
    read(theirs, folder / "ours")
    write(theirs, folder / "theirs")
    back = built(LOCAL, asked)
    read(back, folder / "theirs")
    files = [ShardReader(folder / name) for name in ("ours", "theirs")]
    loss = {}
    batch = batch_of(SHAPE.vocabulary)
    for name, model in (("ours", ours), ("theirs", theirs)):
        loss[name] = (model(batch) * batch.loss_mask).sum()
        loss[name].backward()
    gradients = [{n: p.grad for n, p in named(model).items()} for model in (ours, theirs)]
    return {
        "kinds": kinds(theirs),
        "names": sorted(named(ours).keys() ^ named(theirs).keys()),
        "parts": [n for n, _ in theirs.named_parameters() if part_of(n) != part_of(canonical(n))],
        "stored": differing(stored(ours), stored(theirs)),
        "tensors": len(files[0].tensors),
        "on disk": sorted(files[0].tensors.keys() ^ files[1].tensors.keys())
        + [n for n in files[0].tensors if not torch.equal(files[0].read(n), files[1].read(n))],
        "back": [n for n, p in named(back).items() if not torch.equal(p, named(ours)[n])],
        "marks": differing(marks(ours), marks(theirs)),
        "logits": relative(theirs(batch, with_loss=False), ours(batch, with_loss=False)),
        "loss": relative(loss["theirs"], loss["ours"]),
        "gradients": max(relative(gradients[1][n], gradients[0][n]) for n in gradients[0]),
        "gives": differing(gives(ours, asked), gives(theirs, asked)),
        "given": len(gives(ours, asked)),
    }


def write(model: UniMoEModel, folder: Path) -> None:
    folder.mkdir(parents=True)
    write_shards(folder, sharded_tensors(model.sharded_state_dict()), 0)


def read(model: UniMoEModel, folder: Path) -> None:
    reader = ShardReader(folder)
    for tensor in sharded_tensors(model.sharded_state_dict()):
        reader.fill(tensor)


def gives(model: UniMoEModel, asked: Recipe) -> dict[str, list[float]]:
    """What a run with this model leaves for later stages."""
    return {
        f"{tensor.key} {tuple(tensor.global_offset)}": tensor.data.flatten().tolist()
        for tensor in _given(model, asked)
    }


def assembled(folder: Path) -> dict[str, Any]:
    """A mixture put together from a base and an expert that the other kind of modules wrote."""
    for name, modules, seed in (("base", TE, 1), ("expert", LOCAL, 2)):
        dense = recipe()
        dense.trainer.seed = seed
        model = built(modules, dense)
        load_sources(model, Sources(), dense)
        write(model, folder / name)
    facts = Manifest("base", "", "", "", "", {})
    sources = Sources(facts, folder / "base", [None, folder / "expert", None, None])
    models = {modules: built(modules, recipe(4)) for modules in (TE, LOCAL)}
    for model in models.values():
        load_sources(model, sources, recipe(4))
    weights = {modules: named(model) for modules, model in models.items()}
    names = [name for name in weights[LOCAL] if name.endswith("experts.1.linear_fc1.weight")]
    others = [name.replace("experts.1.", "experts.0.") for name in names]
    return {
        "experts": len(names),
        "apart": all(
            not torch.equal(weights[TE][a], weights[TE][b])
            for a, b in zip(names, others, strict=True)
        ),
        "differing": [n for n, p in weights[LOCAL].items() if not torch.equal(p, weights[TE][n])],
    }


def trained(folder: Path) -> dict[str, Any]:
    """Steps, and checkpoints with optimizer state, handed from one kind of modules to the other."""
    asked = recipe(4)
    collection = ProcessGroupCollection.use_mpu_process_groups()
    batch = batch_of(SHAPE.vocabulary)

    def module(modules: str, start: Start | None = None) -> TrainModule:
        with of(modules) as flags:
            return TrainModule(asked, collection, {}, flags, Sources(), "fp32", start)

    def step(module: TrainModule, number: int) -> list[float]:
        result = train_step(module, [batch], number)
        return [result.sums[:, 0].sum().item(), result.grad_norm]

    results: dict[str, Any] = {}
    inventory = {}
    for writer, taker in ((TE, LOCAL), (LOCAL, TE)):
        first, second = module(writer), module(taker)
        inventory[writer] = as_json(first.inventory)
        begun = [step(first, number) for number in range(2)]
        path = folder / writer
        path.mkdir(parents=True)
        HostCopy().take(checkpoint_pieces(first.chunks, first.optimizer)).write(path, 0)
        load_pieces(ShardReader(path), second.chunks, second.optimizer)
        inits = module(taker, Start(path, "model."))
        results[writer] = {
            "begun": begun,
            "on": step(first, 2),
            "taken on": step(second, 2),
            "init_from": inits.began_with,
            "first loss of init_from": step(inits, 0)[0],
        }
    results["inventory"] = inventory[TE] == inventory[LOCAL]
    results["files"] = sorted(
        ShardReader(folder / TE).tensors.keys() ^ ShardReader(folder / LOCAL).tensors.keys()
    )
    return results


def divided(case: str, layout: dict[str, Any]) -> dict[str, Any]:
    """The same names, blocks and marks on a rank of a large layout, built without memory."""
    asked = recipe(**CASES[case], **LAYOUT, **layout)
    with imagined(asked.parallel, RANKS, RANK) as world:
        ours, theirs = (built(m, asked, world.groups, memory=False) for m in (LOCAL, TE))
        return {
            "names": sorted(named(ours).keys() ^ named(theirs).keys()),
            "stored": differing(stored(ours), stored(theirs)),
            "marks": differing(marks(ours), marks(theirs)),
            "with memory": [n for n, p in theirs.named_parameters() if not p.is_meta],
            "parameters": len(named(theirs)),
        }


def refused() -> dict[str, str]:
    """What is said where adapters are wanted on layers that are fused with others."""
    model, said = built(TE, recipe(4)), {}
    for target in ("attention", "mlp", "experts"):
        with pytest.raises(TypeError) as error:
            add_lora(model.language_model, LoRAConfig(targets=[target], rank=3))
        said[target] = str(error.value)
    return said


def all_cases(folder: Path, gpu: dict[str, Any]) -> dict[str, Any]:
    """Every comparison, by name.

    Args:
        gpu: flags of a machine with a GPU.
    """
    without_te.patch_torch_norm()  # of the local modules, under sequence parallelism
    collection = groups.initialise(ParallelConfig())
    found: dict[str, Any] = {"with a GPU's flags": {}}
    for dtype in (torch.float32, torch.bfloat16):
        model = build_model(recipe(4), collection, {}, dtype, gpu, memory=False)
        found["with a GPU's flags"][str(dtype)] = kinds(model)
    layers.FUSED_ATTENTION_TYPES += (torch.float32,)  # the stand-in's attention takes it
    found["beside"] = {case: beside(case, folder / str(i)) for i, case in enumerate(CASES)}
    found["refused"] = refused()
    found["assembled"] = assembled(folder / "assembled")
    found["trained"] = trained(folder / "trained")
    groups.destroy()
    found["divided"] = {
        case: [divided(case, more) for more in (EXPERT_LAYOUTS if "experts" in case else ({},))]
        for case in CASES
    }
    return found
