"""Runs in one process of ``run_distributed``: exports beside our model, as others load them."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
from copy import deepcopy
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from data_pipeline.conversation.template import render
from data_pipeline.conversation.tokenizer import TextTokenizer
from tests.checkpoints.cases_convert import logits_of
from tests.checkpoints.small_gguf import SPECIAL
from tests.checkpoints.small_models import model_of, saved
from tests.checkpoints.small_tokenizer import tokenizer as chatml
from tests.exporting.made import Made, make, recipe_of
from unimoe_mcore import export as command
from unimoe_mcore.checkpoints.artefact import read_manifest
from unimoe_mcore.checkpoints.store import ShardReader
from unimoe_mcore.config.errors import UserError
from unimoe_mcore.config.parallel import ParallelConfig
from unimoe_mcore.config.towers import ConnectorConfig
from unimoe_mcore.convert import convert
from unimoe_mcore.exporting.folder import write_export
from unimoe_mcore.exporting.llama_form import as_llama
from unimoe_mcore.exporting.subject import open_subject
from unimoe_mcore.runtime import groups

LENGTH = 150
BASES: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied": {"model__language__tied": False, "model__language__kv_heads": 4},
    "llama3": {
        "model__language__rope_scaling": "llama3",
        "model__language__rope_factor": 8.0,
        "model__language__rope_original_tokens": 32,
        "model__language__rope_base": 500.5,
    },
}
MIXTURES: dict[str, dict[str, Any]] = {
    "interval": {"stage__lora__alpha": 5.0},
    "all": {"model__moe__placement": "all", "stage__lora__targets": ["attention", "experts"]},
    "experts only": {
        "model__moe__placement": "second_half",
        "stage__lora__targets": ["experts"],
    },
    "attention only": {"model__moe__top_k": 3, "stage__lora__targets": ["attention"]},
}
command.open_subject = cache(command.open_subject)  # reads a recipe: as long as all the rest


def export(source: Path, folder: Path, form: str, *more: str) -> list[str]:
    """Export by the command line; the lines that it prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert command.main([str(source), str(folder), "--as", form, *more]) == 0
    return printed.getvalue().splitlines()


def loaded(folder: Path) -> Any:
    """Transformers' model of a folder; every tensor has its place and every place its tensor."""
    model, found = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(found.values()), found
    return model.eval()


@torch.no_grad()
def difference(theirs: Any, ours: Made) -> dict[str, float]:
    """Largest difference of logits over a sequence, as a share of the largest logit."""
    words = theirs.config.vocab_size
    ids = torch.randint(8, words, (LENGTH,), generator=torch.Generator().manual_seed(1))
    expected = logits_of(ours.model, ids.tolist())[:, :words]
    found = theirs(input_ids=ids[None]).logits[0]
    return {
        "difference": ((found - expected).abs().max() / expected.abs().max()).item(),
        "deviation": expected.std().item(),
    }


def adapted(base: Path, adapters: Path) -> Any:
    """PEFT's model; every adapter of the file has its place, and none is left as it began."""
    model = PeftModel.from_pretrained(loaded(base), adapters).eval()
    again = model.load_adapter(str(adapters), "default")
    assert not again.unexpected_keys, again
    assert not [name for name in again.missing_keys if "lora" in name], again
    return model


def llamas(world: Path) -> dict[str, Any]:
    """Bases, tied and not, and a dense run with adapters."""
    found: dict[str, Any] = {}
    for name, changes in BASES.items():
        base = make(world, "base", "" if name == "tied" else name, **changes)
        folder = world / "out" / name
        printed = export(base.gives, folder, "llama", "--shard-size", "30000")
        found[name] = difference(loaded(folder), base)
        convert(folder, world / "again" / name, torch.float32)
        before, after = (read_manifest(f, "") for f in (base.gives, world / "again" / name))
        found[name] |= {
            "files": len(list(folder.glob("*.safetensors"))),
            "printed": printed,
            "same": before.tensors == after.tensors and len(before.tensors) > 10,
            "shape": before.language == after.language,
            "left out": "Not in it" in (folder / "README.md").read_text(),
        }
    export(world / "runs" / "base", world / "out" / "run", "llama")
    found["run"] = weights(world / "out" / "run") == weights(world / "out" / "tied")
    return found


def weights(folder: Path) -> dict[str, list[float]]:
    """Every tensor's values."""
    tensors: dict[str, Tensor] = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    return {name: value.flatten().tolist() for name, value in tensors.items()}


def denses(world: Path) -> dict[str, Any]:
    """A dense run with adapters on attention and MLPs."""
    changes: dict[str, Any] = {
        "stage__train": ["lora", "connectors"],
        "stage__lora__targets": ["attention", "mlp"],
    }
    run = make(world, "dense", **changes, stage__lora__alpha=5.0)
    out = world / "out"
    printed = export(run.folder, out / "dense", "llama")
    export(run.folder, out / "dense apart", "llama", "--adapters", "apart")
    export(run.folder, out / "dense peft", "peft")
    export(run.gives, out / "dense given", "llama")
    merged = make(world, "dense", "merged", **changes, stage__lora__merge=True)
    export(merged.folder, out / "merged", "llama")
    export(merged.gives, out / "merged given", "llama")
    return {
        "merged": difference(loaded(out / "dense"), run),
        "peft": difference(adapted(out / "dense apart", out / "dense peft"), run),
        "without": difference(loaded(out / "dense apart"), run),
        "given": weights(out / "dense") == weights(out / "dense given"),
        "given merged": weights(out / "merged") == weights(out / "merged given"),
        "printed": printed,
        "readme": (out / "dense" / "README.md").read_text(),
    }


def mixtures(world: Path) -> dict[str, Any]:
    """Mixtures with experts in every second block, in all, and in the second half."""
    found: dict[str, Any] = {}
    out = world / "out"
    for name, changes in MIXTURES.items():
        run = make(world, "stage3", name.replace(" ", "-"), **changes)
        export(run.folder, out / name, "mixtral", "--shard-size", "100000")
        export(run.folder, out / f"{name} apart", "mixtral", "--adapters", "apart")
        export(run.folder, out / f"{name} peft", "peft")
        found[name] = {
            "merged": difference(loaded(out / name), run),
            "peft": difference(adapted(out / f"{name} apart", out / f"{name} peft"), run),
            "without": difference(loaded(out / f"{name} apart"), run),
            "config": json.loads((out / name / "config.json").read_text()),
            "readme": (out / name / "README.md").read_text(),
        }
    return found


def imported_again(world: Path) -> dict[str, Any]:
    """A mixture as Mixtral, imported; and bases with rows that only fill up, exported and back."""
    out, found = world / "out", dict[str, Any]()
    convert(out / "all", world / "mixtral", torch.float32)
    ours = open_subject(world / "runs" / "all").weights
    differing: list[str] = []
    for expert, folder in enumerate(["", "expert-1", "expert-2", "router"]):
        reader = ShardReader(world / "mixtral" / folder)
        for name in reader.tensors:
            wanted = ours.merged(name, expert if ".mlp.linear" in name else None).read()
            if not torch.equal(reader.read(name), wanted):
                differing.append(f"{folder} {name}")
    found["mixtral"] = differing
    for name, special in {"spare": SPECIAL, "no spare": SPECIAL[:3]}.items():
        tokens = chatml(special)
        source = saved(world / "source" / name, model_of("llama", vocab_size=len(special) + 259))
        tokens.save(str(source / "tokenizer.json"))
        convert(source, world / name, torch.float32)
        export(world / name, out / name, "llama")
        convert(out / name, world / "again" / name, torch.float32)
        first, second = (read_manifest(f, "") for f in (world / name, world / "again" / name))
        found[name] = {
            "same": first.tensors == second.tensors,
            "weights": weights(source) == weights(out / name),
            "rows": [first.language["vocabulary"], first.language["unpadded_vocabulary"]],
            "tokenizer": spoken(out / name, world / name),
            "tokens": len(AutoTokenizer.from_pretrained(out / name)),
        }
    return found


def spoken(folder: Path, base: Path) -> list[bool]:
    """Whether transformers' tokenizer makes the tokens that our own does."""
    theirs = AutoTokenizer.from_pretrained(folder)
    ours = TextTokenizer.load(base / "tokenizer.json")
    said: list[bool] = []
    for text in ("the end", " of  it\n\nand the 2nd.", "caf\u00e9 \u2603"):
        said.append(theirs(text, add_special_tokens=False)["input_ids"] == ours.encode(text))
        said.append(theirs.decode(ours.encode(text)).strip() == ours.decode(ours.encode(text)))
    turns = ["  What is it? ", "The end.", "Why\nthat?", "It is.", "And?"]
    roles = ("user", "assistant"), ("human", "gpt")
    for count in (1, 3, 5):
        kinds = [[pair[i % 2] for i in range(count)] for pair in roles]
        asked = [{"role": r, "content": t} for r, t in zip(kinds[0], turns, strict=False)]
        known = [{"from": r, "value": t} for r, t in zip(kinds[1], turns, strict=False)]
        found = theirs.apply_chat_template(asked, add_generation_prompt=True)["input_ids"]
        said.append(found == render(known, ours, {}).ids)
    special = (theirs.eos_token_id, theirs.pad_token_id)
    return [*said, special == (ours.end, ours.pad)]


def official(world: Path) -> dict[str, Any]:
    """Experts and mixtures under Uni-MoE's names: shapes, and whether values are Mixtral's."""
    out, runs = world / "out", world / "runs"
    printed = export(runs / "stage2-image", out / "expert", "uni-moe")
    export(runs / "stage2-image" / "gives", out / "expert given", "uni-moe")
    export(runs / "all", out / "official", "uni-moe")
    export(runs / "interval", out / "official apart", "uni-moe", "--adapters", "apart")
    towers = deepcopy(recipe_of(world, "stage1").model.towers)
    towers["image"].frame_order = "average"
    towers["image"].connector = ConnectorConfig(input_norm=False, positions=False, max_tokens=8)
    run = make(world, "stage1", "projector", model__towers=towers)
    said = export(run.gives, out / "projector", "uni-moe")
    projector = run.model.modality_submodules["image"].input_projections[0].project
    values = load_file(out / "projector" / "mm_projector.safetensors")
    mixtral, ours = weights(out / "all"), weights(out / "official")
    short = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
    renamed = {
        re.sub(
            r"experts\.(\d+)\.(w\d)",
            lambda m: f"experts.{m[1]}.{short[m[2]]}",
            name.replace("block_sparse_moe", "mlp"),
        ): value
        for name, value in mixtral.items()
    }
    return {
        "expert": shapes(out / "expert"),
        "given": weights(out / "expert") == weights(out / "expert given"),
        "printed": printed,
        "mixture": renamed == ours,
        "gates": shapes(out / "official", "mlp_gates"),
        "adapters": shapes(out / "official apart", "adapter_model"),
        "projector": shapes(out / "projector"),
        "said": said,
        "same": [
            torch.equal(values[f"model.mm_projector.{layer}.weight"], projector[layer].weight)
            for layer in (0, 2)
        ],
    }


def shapes(folder: Path, stem: str = "*") -> dict[str, list[int]]:
    """Every tensor's shape."""
    return {
        name: list(value.shape)
        for path in sorted(folder.glob(f"{stem}.safetensors"))
        for name, value in load_file(path).items()
    }


def refusals(world: Path) -> dict[str, str]:
    """What is refused, and that nothing is left behind."""
    runs = world / "runs"
    lone = world / "lone"
    for name in ("stage2-image", "interval"):
        shutil.copytree(runs / name / "gives", lone / name)
    damaged = world / "damaged"
    shutil.copytree(runs / "base" / "gives", damaged)
    with (damaged / "rank-00000.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")
    asked: dict[str, tuple[Path, str, tuple[str, ...]]] = {
        "a mixture as llama": (runs / "interval", "llama", ()),
        "a base as mixtral": (runs / "base", "mixtral", ()),
        "a base as uni-moe": (runs / "base", "uni-moe", ()),
        "a base as peft": (runs / "base", "peft", ()),
        "merged adapters": (runs / "merged" / "gives", "peft", ()),
        "connectors as llama": (runs / "stage1", "llama", ()),
        "connectors as uni-moe": (runs / "stage1", "uni-moe", ()),
        "an expert without its base": (lone / "stage2-image", "llama", ()),
        "a mixture without its experts": (lone / "interval", "mixtral", ()),
        "nothing": (world / "data", "llama", ()),
        "damaged": (damaged, "llama", ()),
        "no such checkpoint": (runs / "base", "llama", ("--checkpoint", "step-7")),
        "no size": (runs / "base", "llama", ("--shard-size", "0")),
    }
    before = {path.name for path in (world / "out").iterdir()}
    said: dict[str, str] = {}
    for name, (source, form, more) in asked.items():
        try:
            export(source, world / "out" / "refused", form, *more)
        except UserError as error:
            said[name] = str(error)
    try:
        export(runs / "base", world / "out" / "tied", "llama")
    except UserError as error:
        said["a folder that is there"] = str(error)
    said |= by_routing(runs / "interval")
    said["unreadable in the middle"] = broken_off(
        runs / "base" / "gives", world / "out" / "refused"
    )
    said["left behind"] = str(sorted({path.name for path in (world / "out").iterdir()} - before))
    return said


def by_routing(run: Path) -> dict[str, str]:
    """A mixture if it routed otherwise; what only training does is no reason."""
    subject, said = command.open_subject(run), dict[str, str]()
    moe = {
        "pre-softmax": {"score": "pre_softmax"},
        "sigmoid": {"score": "sigmoid"},
        "bias": {"score": "sigmoid", "balance": "bias"},
        "half": {"placement": "first_half"},
        "training": {"capacity": 1.0, "jitter": 0.1, "z_loss": 0.1, "balance": "global"},
    }
    others = {name: replace(subject, moe=replace(subject.moe, **c)) for name, c in moe.items()}
    others["shared"] = replace(subject, shared=True)
    for name, other in others.items():
        for form in ("mixtral", "peft", "uni-moe"):
            try:
                command.FORMS[form](other, True)
            except UserError as error:
                said[f"{name} as {form}"] = str(error)
    return said


def broken_off(source: Path, folder: Path) -> str:
    """A source whose last tensors cannot be read once the first are written."""
    subject = open_subject(source)
    exported = as_llama(subject, merge=True)
    reader = subject.weights.base
    assert reader is not None
    for name in list(reader.tensors)[-2:]:
        (part,) = reader.tensors[name].parts
        reader.tensors[name] = replace(reader.tensors[name], parts=(replace(part, name="lost"),))
    try:
        write_export(folder, subject, exported, torch.float32, 10_000)
    except UserError as error:
        return str(error)
    return ""


def in_bf16(world: Path) -> dict[str, Any]:
    """A merged model in bf16: that in fp32, rounded."""
    folder = world / "out" / "bf16"
    export(world / "runs" / "dense", folder, "llama", "--dtype", "bf16")
    whole = load_file(world / "out" / "dense" / "model.safetensors")
    found = load_file(folder / "model.safetensors")
    return {
        "same": all(torch.equal(found[name], whole[name].bfloat16()) for name in whole),
        "said": json.loads((folder / "config.json").read_text())["torch_dtype"],
    }


def all_cases(folder: str) -> dict[str, Any]:
    """Everything."""
    groups.initialise(ParallelConfig())
    world = Path(folder)
    found: dict[str, Any] = {"llamas": llamas(world)}
    made = make(world, "stage1"), make(world, "stage2")
    found["spoken"] = spoken(world / "out" / "tied", made[0].folder.parent / "base" / "gives")
    found["expert"] = as_dense(world, made[1])
    found["dense"] = denses(world)
    found["bf16"] = in_bf16(world)
    found["mixtures"] = mixtures(world)
    found["again"] = imported_again(world)
    found["official"] = official(world)
    found["refused"] = refusals(world)
    return found


def as_dense(world: Path, expert: Made) -> dict[str, float]:
    """A stage-2 run as the dense model that it trained."""
    export(expert.folder, world / "out" / "expert as llama", "llama")
    return difference(loaded(world / "out" / "expert as llama"), expert)
