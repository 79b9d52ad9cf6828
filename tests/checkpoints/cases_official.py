"""Runs in one process of ``run_distributed``: mixtures put together from published files."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from safetensors.torch import save_file
from torch import Tensor

from tests.checkpoints.cases_convert import batch_of
from tests.checkpoints.small_models import FFN, HIDDEN, model_of, saved
from tests.model.reference import mixtral
from unimoe_mcore.checkpoints.artefact import read_manifest
from unimoe_mcore.checkpoints.loading import begin_with, load_sources
from unimoe_mcore.checkpoints.sources import find_sources
from unimoe_mcore.checkpoints.starting import find_start
from unimoe_mcore.checkpoints.store import ShardReader
from unimoe_mcore.config.errors import UserError
from unimoe_mcore.config.model import LanguageConfig, ModelConfig, MoEConfig
from unimoe_mcore.config.parallel import ParallelConfig
from unimoe_mcore.config.recipe import Recipe
from unimoe_mcore.config.stage import OWN_MLP, StageConfig
from unimoe_mcore.convert import convert, convert_expert, convert_routers, main
from unimoe_mcore.model.build import build_model
from unimoe_mcore.model.parts import train_only
from unimoe_mcore.model.unimoe import UniMoEModel
from unimoe_mcore.runtime import groups
from unimoe_mcore.runtime.capabilities import detect, transformer_flags

type State = dict[str, Tensor]

BLOCKS, RANK, ALPHA, LENGTH, WORDS = 4, 8, 16, 60, 320
SHAPES = {"gate": (FFN, HIDDEN), "up": (FFN, HIDDEN), "down": (HIDDEN, FFN)}
SHAPE: dict[str, Any] = {"num_hidden_layers": BLOCKS, "vocab_size": WORDS}
RUNTIME = "deepspeed_moe.experts.deepspeed_experts.0."


def random(seed: int, *shape: int) -> Tensor:
    return 0.25 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def expert(seed: int) -> State:
    """An expert as it was published."""
    return {
        f"model.layers.{block}.mlp.{kind}_proj.weight": random(100 * seed + 10 * block + n, *shape)
        for block in range(BLOCKS)
        for n, (kind, shape) in enumerate(SHAPES.items())
    }


def adapters(seed: int) -> State:
    """One expert's adapters as the eight-expert model was released."""
    found = {}
    for block in range(BLOCKS):
        for n, (kind, (outputs, inputs)) in enumerate(SHAPES.items()):
            name = f"model.layers.{block}.mlp.{RUNTIME}{kind}_proj_lora_"
            found[f"{name}A.weight"] = random(1000 + 100 * seed + 10 * block + n, RANK, inputs)
            found[f"{name}B.weight"] = random(2000 + 100 * seed + 10 * block + n, outputs, RANK)
    return found


def routers(experts: int, blocks: list[int], gate: str = "gate") -> State:
    """Routers as they were published."""
    return {f"model.layers.{b}.mlp.{gate}.weight": 4 * random(b, experts, HIDDEN) for b in blocks}


def naively_adapted(weights: State, halves: State) -> State:
    """``W + 16 / 8 * B A``, row by row in fp64."""
    found = {}
    for name, weight in weights.items():
        there = name.replace(".mlp.", f".mlp.{RUNTIME}").removesuffix(".weight")
        a, b = (halves[f"{there}_lora_{half}.weight"].double() for half in "AB")
        rows = [w.double() + ALPHA / RANK * (a.T @ row) for w, row in zip(weight, b, strict=True)]
        found[name] = torch.stack(rows)
    return found


class Place:
    """A base, published files of every form, and what was made of them.

    Attributes:
        experts: what a recipe calls an expert -> its published weights.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.base = folder, folder / "base"
        own, other = (model_of("llama", **SHAPE) for _ in range(2))
        with torch.no_grad():
            for weight in other.parameters():
                weight.copy_(weight.flip(0))
        convert(saved(folder / "llava", own), self.base, torch.float32)
        saved(folder / "vicuna", other)
        self.own = {name: value.detach() for name, value in own.state_dict().items()}
        torch.save(expert(1), folder / "mlp_base1.bin")
        wrapped = {f"base_model.model.{name}": value for name, value in expert(4).items()}
        save_file(wrapped, folder / "mlp_base4.safetensors")
        torch.save(adapters(7), folder / "3_mlp_experts.bin")
        self.experts: dict[str, State] = {
            OWN_MLP: {name: self.own[name] for name in expert(1)},
            self.converted("mlp_base1.bin"): expert(1),
            self.converted("mlp_base4.safetensors"): expert(4),
            self.converted("vicuna"): {n: other.state_dict()[n].detach() for n in expert(1)},
        }
        adapted = folder / "made" / "adapted"
        convert_expert(
            folder / "mlp_base1.bin", adapted, self.base, torch.float32,
            folder / "3_mlp_experts.bin",
        )  # fmt: skip
        self.adapted = adapted

    def converted(self, name: str) -> str:
        made = self.folder / "made" / Path(name).stem
        convert_expert(self.folder / name, made, self.base, torch.float32)
        return str(made)

    def recipe(self, experts: list[str], placement: str, start: str = "") -> Recipe:
        """Stage 3 of these experts, without towers."""
        language = LanguageConfig(**read_manifest(self.base, "").language)
        stage = StageConfig(
            kind="moe", base=str(self.base), experts=experts, init_from=start, train=["router"]
        )
        return Recipe(stage=stage, model=ModelConfig(language, MoEConfig(placement=placement)))

    def assembled(self, recipe: Recipe) -> UniMoEModel:
        """The model as a run of stage 3 begins with it."""
        collection = ProcessGroupCollection.use_mpu_process_groups()
        model = build_model(recipe, collection, {}, torch.float32, transformer_flags(detect()))
        sources = find_sources(recipe)
        load_sources(model, sources, recipe)
        train_only(model, recipe.stage)
        if start := find_start(recipe, sources):
            begin_with([model], start)
        return model.eval()


def where_they_are(place: Place, order: list[str]) -> list[str]:
    """Where an assembled mixture's experts are not, bit for bit, the published ones in order."""
    model = place.assembled(place.recipe(order, "all")).language_model
    wrong = []
    for block in range(BLOCKS):
        local = model.decoder.layers[2 * block + 1].mlp.experts.local_experts
        for number, name in enumerate(order):
            gate, up, down = (
                place.experts[name][f"model.layers.{block}.mlp.{kind}_proj.weight"]
                for kind in SHAPES
            )
            same = torch.equal(local[number].linear_fc1.weight, torch.cat([gate, up]))
            if not (same and torch.equal(local[number].linear_fc2.weight, down)):
                wrong.append(f"block {block}, expert {number}: {name}")
    return wrong


@torch.no_grad()
def beside_mixtral(place: Place, order: list[str], placement: str, gate: str) -> dict[str, float]:
    """Logits of an assembled mixture, with published routers, and of transformers' Mixtral.

    Mixtral chooses two logits and takes the softmax over them.
    """
    sparse = {"all": list(range(BLOCKS)), "interval": [0, 2]}[placement]
    gates = routers(len(order), sparse, gate)
    source, made = place.folder / "mlp_gates.bin", place.folder / "made" / "routers"
    torch.save({**gates, "base_model.model.model.layers.0.mlp.gate.lora_A.default.weight":
                torch.zeros(8, HIDDEN)}, source)  # fmt: skip
    convert_routers(source, made, place.base, torch.float32)
    recipe = place.recipe(order, placement, str(made))
    model, language = place.assembled(recipe), recipe.model.language
    dense = [block for block in range(BLOCKS) if block not in sparse]
    theirs = mixtral(language, len(order), dense)
    weights = {name: value for name, value in place.own.items() if ".mlp." not in name}
    for block in range(BLOCKS):
        prefix = f"model.layers.{block}.mlp."
        if block in dense:
            weights |= {n: v for n, v in place.own.items() if n.startswith(prefix)}
            continue
        parts = [
            [place.experts[e][f"{prefix}{kind}_proj.weight"] for kind in SHAPES] for e in order
        ]
        gate_up = [torch.cat([g, u]) for g, u, _ in parts]
        weights[f"{prefix}experts.gate_up_proj"] = torch.stack(gate_up)
        weights[f"{prefix}experts.down_proj"] = torch.stack([down for _, _, down in parts])
        weights[f"{prefix}gate.weight"] = gates[f"{prefix}{gate}.weight"]
    theirs.load_state_dict(weights)
    ids = torch.randint(8, WORDS, (LENGTH,), generator=torch.Generator().manual_seed(1))
    expected = theirs(input_ids=ids[None]).logits[0]
    found = model(batch_of(ids.tolist()), with_loss=False)[0]
    return {
        "difference": ((found - expected).abs().max() / expected.abs().max()).item(),
        "deviation": expected.std().item(),
        "another order": other_order(place, recipe, ids, expected),
    }


def other_order(place: Place, recipe: Recipe, ids: Tensor, expected: Tensor) -> float:
    """The same with the first two experts exchanged: what the comparison can see."""
    first, second, *rest = recipe.stage.experts
    stage = replace(recipe.stage, experts=[second, first, *rest])
    found = place.assembled(replace(recipe, stage=stage))(batch_of(ids.tolist()), with_loss=False)
    return ((found[0] - expected).abs().max() / expected.abs().max()).item()


def adapted_differences(place: Place) -> dict[str, float]:
    """An expert with adapters beside ``W + 16 / 8 * B A``, and beside ``W``."""
    reader = ShardReader(place.adapted)
    naive = naively_adapted(expert(1), adapters(7))
    found = {"sum": 0.0, "weights": 1.0}
    for block in range(BLOCKS):
        gate, up, down = (f"model.layers.{block}.mlp.{kind}_proj.weight" for kind in SHAPES)
        for half, theirs in ((1, [gate, up]), (2, [down])):
            value = reader.read(f"language_model.decoder.layers.{2 * block + 1}.mlp.linear_fc{half}"
                                ".weight")  # fmt: skip
            wanted = torch.cat([naive[name] for name in theirs])
            plain = torch.cat([expert(1)[name] for name in theirs])
            largest = wanted.abs().max().item()
            difference = (value - wanted).abs().max().item() / largest
            found["sum"] = max(found["sum"], difference)
            found["weights"] = min(found["weights"], (value - plain).abs().max().item() / largest)
    return found


def without(state: State, name: str) -> State:
    return {key: value for key, value in state.items() if key != name}


GATE = "model.layers.2.mlp.gate_proj.weight"
LORA = f"model.layers.1.mlp.{RUNTIME}up_proj_lora_B.weight"


def refusals(place: Place) -> dict[str, str]:
    """What is said of files that do not fit; nothing may be left behind."""
    whole, halves = expert(1), adapters(7)
    spoilt: dict[str, tuple[State, State]] = {
        "missing": (without(whole, GATE), {}),
        "extra": ({**whole, "model.layers.0.self_attn.q_proj.weight": random(0, 4, 4)}, {}),
        "shape": ({**whole, GATE: random(0, FFN, HIDDEN - 1)}, {}),
        "name": ({**without(whole, GATE), GATE.replace("gate", "gat"): whole[GATE]}, {}),
        "numbers": ({**whole, GATE: whole[GATE].char()}, {}),
        "block": ({**whole, GATE.replace(".2.", ".4."): whole[GATE]}, {}),
        "twice": ({**whole, f"base_model.model.{GATE}": whole[GATE]}, {}),
        "several": ({**whole, GATE.replace("mlp.", f"mlp.{RUNTIME}"): whole[GATE]}, {}),
        "adapter missing": (whole, without(halves, LORA)),
        "adapter shape": (whole, {**halves, LORA: random(0, FFN, RANK + 1)}),
        "adapter extra": (whole, {**halves, GATE: whole[GATE]}),
        "no adapter": (whole, {"x": random(0, 1)}),
    }
    said = {}

    def refused(name: str, call: Callable[[], Any]) -> None:
        try:
            call()
        except UserError as error:
            said[name] = str(error).replace(f"{place.folder}/", "")

    made, source, lora = (place.folder / name for name in ("made/spoilt", "s.bin", "lora.bin"))
    expert_of = partial(convert_expert, folder=made, base=place.base, dtype=torch.float32)
    for name, (weights, more) in spoilt.items():
        torch.save(weights, source)
        torch.save(more, lora)
        refused(name, partial(expert_of, source, adapters=lora if more else None))
    for name, state in {
        "placement": routers(4, [0, 1, 3]),
        "router shape": {**routers(4, [0, 2]), **routers(3, [2])},
        "no routers": expert(1),
    }.items():
        torch.save(state, source)
        refused(name, partial(convert_routers, source, made, place.base, torch.float32))
    good = place.folder / "mlp_base1.bin"
    refused("no base", partial(expert_of, good, base=place.folder / "made" / "mlp_base1"))
    refused("a base's folder", partial(expert_of, good, folder=place.base))
    refused("absent", partial(expert_of, made))
    refused("alpha", partial(expert_of, good, adapters=lora, alpha=float("nan")))
    refused("pointless", partial(main, [str(good), str(made), "--adapters", str(lora)]))
    said["left behind"] = ", ".join(path.name for path in place.folder.rglob("*spoilt"))
    return said


def printed(place: Place) -> str:
    """What the command says of an expert that is made again of a whole model."""
    command = [str(place.folder / "vicuna"), str(place.folder / "made" / "vicuna")]
    with redirect_stdout(StringIO()) as output:
        main([*command, "--expert-of", str(place.base), "--dtype", "bf16"])
    return output.getvalue().replace(f"{place.folder}/", "")


def all_cases(folder: str) -> dict[str, Any]:
    """Every form of file, in two orders."""
    groups.initialise(ParallelConfig())
    place = Place(Path(folder))
    order = list(place.experts)
    turned = [order[2], order[0], order[3], order[1]]
    return {
        "order": where_they_are(place, order),
        "turned": where_they_are(place, turned),
        "twice": where_they_are(place, [order[1], order[0], order[1], order[2]]),
        "adapted": adapted_differences(place),
        "all": beside_mixtral(place, order, "all", "gate"),
        "interval": beside_mixtral(place, turned, "interval", "deepspeed_moe.gate.wg"),
        "refusals": refusals(place),
        "printed": printed(place),
    }
