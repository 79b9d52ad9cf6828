"""Experts and routers in the files that Uni-MoE published, and MLPs of other models as experts.

Their names (a ``base_model.`` or ``base_model.model.`` in front of them is PEFT's):

* an expert: ``model.layers.{i}.mlp.{gate,up,down}_proj.weight``, in every block;
* one of the eight-expert model as its processes hold it: the same behind
  ``mlp.deepspeed_moe.experts.deepspeed_experts.{n}.``, where ``n`` counts within the process;
* its adapter: ``..._proj_lora_A.weight`` ``[rank, in]`` and ``..._proj_lora_B.weight``
  ``[out, rank]``, of which the release has one file an expert and nothing else;
* routers: ``model.layers.{i}.mlp.gate.weight`` or ``...mlp.deepspeed_moe.gate.wg.weight``,
  ``[experts, hidden]``, in the blocks that have experts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from unimoe_mcore.checkpoints.deferred import Deferred
from unimoe_mcore.checkpoints.hf_config import read_config
from unimoe_mcore.checkpoints.hf_files import read_weights
from unimoe_mcore.checkpoints.hf_folder import named
from unimoe_mcore.checkpoints.importing import import_rules
from unimoe_mcore.checkpoints.llama import DENSE, Rule, of_blocks
from unimoe_mcore.checkpoints.safetensors_file import read_safetensors
from unimoe_mcore.checkpoints.torch_file import read_torch
from unimoe_mcore.config.errors import UserError
from unimoe_mcore.config.model import PLACEMENTS, LanguageConfig, moe_blocks

FORMS = {".bin": read_torch, ".safetensors": read_safetensors}
"""Ending of a file's name -> what reads its tensors."""

ALPHA = 16.0
"""Scale of the released adapters (rank 8): their product is multiplied by ``alpha / rank``."""

_WRAPPED = re.compile(r"base_model\.(?:model\.(?=model\.))?")
_EXPERT = r"(model\.layers\.\d+\.mlp\.)(?:deepspeed_moe\.experts\.deepspeed_experts\.(\d{1,4})\.)?"
_WEIGHT = re.compile(_EXPERT + r"((?:gate|up|down)_proj\.weight)")
_ADAPTER = re.compile(_EXPERT + r"((?:gate|up|down)_proj_lora_[AB]\.weight)")
_ROUTER = re.compile(r"(model\.layers\.(\d{1,4})\.mlp\.)(?:deepspeed_moe\.gate\.wg|gate)\.weight")

_OTHERS = {
    r"model\.layers\.\d+\.self_attn\.[qkvo]_proj\.weight": "attention: the base's is used",
    r"model\.layers\.\d+\.(?:input|post_attention)_layernorm\.weight": "norms: the base's are used",
    r"model\.norm\.weight": "norms: the base's are used",
    r"model\.embed_tokens\.weight|lm_head\.weight": "embeddings: the base's are used",
    r"model\.mm_projector\..*": "a connector, no MLP",
}
"""Of a whole model whose MLPs become an expert: pattern of a name -> why it is not taken."""

_ROUTER_ADAPTER = {
    r"model\.layers\.\d+\.mlp\.gate\.lora_[AB](?:\.default)?\.weight": (
        "a router's adapter, which Uni-MoE leaves out as well when it loads"
    ),
}


@dataclass(frozen=True)
class Part:
    """What becomes an artefact that stands on a base.

    Attributes:
        tensors: our name on disk -> values.
        files: what it was read from.
        skipped: name of theirs -> why it was not taken.
        blocks: numbers of the blocks that it has something for.
    """

    tensors: dict[str, Deferred]
    files: list[Path]
    skipped: dict[str, str] = field(default_factory=dict)
    blocks: list[int] = field(default_factory=list)


def read_expert(
    source: Path, language: LanguageConfig, adapters: Path | None = None, alpha: float = ALPHA
) -> Part:
    """MLPs of every block, in the form in which stage 2 gives an expert.

    Args:
        source: a file with nothing but an expert; or a folder of a whole Llama, Mistral or LLaVA,
            of which only the MLPs are taken.
        language: shape of the base.
        adapters: a file with this expert's adapters, which are added to its weights, in fp32.
        alpha: their scale.

    Raises:
        UserError: naming the tensors that are missing, have another shape, or are not known.
    """
    if source.is_dir():
        theirs, skipped, files = _of_folder(source)
    else:
        theirs, skipped, files = _of_file(source), {}, [source]
    weights = _renamed(theirs, _WEIGHT, str(source))
    rules = of_blocks(DENSE, language)
    tensors = import_rules(rules, weights, language, str(source))
    if adapters is not None:
        merged = _merged(weights, adapters, language, alpha)
        tensors, files = import_rules(rules, merged, language, str(source)), [*files, adapters]
    return Part(tensors, files, skipped, list(range(language.blocks)))


def read_routers(source: Path, language: LanguageConfig) -> Part:
    """The routers of a mixture, in the form in which a run that trained them gives them.

    Raises:
        UserError: naming the tensors that are missing, have another shape, or are not known, or
            saying that their blocks are those of no placement.
    """
    found, skipped = _left_out(_of_file(source), _ROUTER_ADAPTER)
    theirs: dict[str, Deferred] = {}
    blocks: dict[int, int] = {}
    for name, tensor in found.items():
        match = _ROUTER.fullmatch(name)
        theirs[f"{match[1]}gate.weight" if match else name] = tensor
        if match and len(tensor.shape) == 2:
            blocks[int(match[2])] = tensor.shape[0]
    placed = [moe_blocks(placement, language.blocks) for placement in PLACEMENTS]
    if not blocks:
        raise UserError(f"{source} holds no routers (model.layers.0.mlp.gate.weight).")
    if len(theirs) < len(found) or sorted(blocks) not in placed:
        raise UserError(
            f"{source} has routers for the blocks {sorted(blocks)} of {language.blocks}, which is "
            f"none of model.moe.placement ({', '.join(PLACEMENTS)})."
        )
    rules = [
        Rule(
            f"decoder.layers.{2 * block + 1}.mlp.router.weight",
            (f"model.layers.{block}.mlp.gate.weight",),
            (("experts", "hidden"),),
        )
        for block in sorted(blocks)
    ]
    sizes = {"experts": blocks[min(blocks)]}
    tensors = import_rules(rules, theirs, language, str(source), sizes)
    return Part(tensors, [source], skipped, sorted(blocks))


def _of_file(path: Path) -> dict[str, Deferred]:
    """A file's tensors, without what PEFT has put in front of their names.

    Raises:
        UserError: if it cannot be read, or two would have one name.
    """
    if not path.is_file():
        raise UserError(f"There is no file {path}.")
    if path.suffix not in FORMS:
        raise UserError(f"{path} cannot be read: its name must end in {' or '.join(FORMS)}.")
    stored = FORMS[path.suffix](path)
    found = {_WRAPPED.sub("", name, count=1): tensor for name, tensor in stored.items()}
    if len(found) < len(stored):
        raise UserError(f"{path} cannot be used: it has a tensor twice, with and without prefix.")
    return found


def _of_folder(folder: Path) -> tuple[dict[str, Deferred], dict[str, str], list[Path]]:
    """The MLPs of a whole model, what was not taken of it and why, and its files.

    Raises:
        UserError: if it is a model of another kind.
    """
    stored, files = read_weights(folder)
    try:
        described = read_config(folder)
        theirs, skipped = named(stored, described.family)
    except (ValueError, OSError) as error:
        raise UserError(f"{folder} cannot be used: {error}.") from error
    if described.family.experts:
        raise UserError(f"{folder} is a mixture itself: convert it as a base, its experts with it.")
    found, others = _left_out(theirs, _OTHERS)
    return found, {**skipped, **others}, files


def _left_out(
    theirs: Mapping[str, Deferred], table: Mapping[str, str]
) -> tuple[dict[str, Deferred], dict[str, str]]:
    """What no pattern of a table fits, and why each of the rest is not taken."""
    skipped = {
        name: reason
        for name in theirs
        for pattern, reason in table.items()
        if re.fullmatch(pattern, name)
    }
    return {name: value for name, value in theirs.items() if name not in skipped}, skipped


def _renamed(
    theirs: Mapping[str, Deferred], pattern: re.Pattern[str], source: str
) -> dict[str, Deferred]:
    """One expert's tensors without the number that its process gave it; others as they are.

    Raises:
        UserError: if there are several experts.
    """
    matches = {name: pattern.fullmatch(name) for name in theirs}
    numbers = {match[2] for match in matches.values() if match}
    if len(numbers) > 1:
        known = ", ".join(sorted(number or "none" for number in numbers))
        raise UserError(f"{source} holds several experts ({known}): keep one in a file.")
    return {
        f"{match[1]}{match[3]}" if match else name: theirs[name] for name, match in matches.items()
    }


def _merged(
    weights: Mapping[str, Deferred], adapters: Path, language: LanguageConfig, alpha: float
) -> dict[str, Deferred]:
    """The weights with ``alpha / rank * B A`` added, fp32.

    Raises:
        UserError: naming the adapter's tensors that are missing, have another shape, or are not
            known.
    """
    halves = _renamed(_of_file(adapters), _ADAPTER, str(adapters))
    rank = next((t.shape[0] for name, t in sorted(halves.items()) if "_lora_A" in name), 0)
    if rank < 1:
        raise UserError(f"{adapters} cannot be used: it has no adapter (..._proj_lora_A.weight).")
    rules = []
    for name, inputs, outputs in _linears(language):
        for half, shape in (("A", ("rank", inputs)), ("B", (outputs, "rank"))):
            rules.append(Rule(f"{name}_{half}", (f"{name}_lora_{half}.weight",), (shape,)))
    import_rules(rules, halves, language, str(adapters), {"rank": rank})

    def summed(name: str) -> Deferred:
        a, b = (halves[f"{name}_lora_{half}.weight"] for half in "AB")
        weight = weights[f"{name}.weight"]

        def read() -> Tensor:
            return weight.read().float() + alpha / rank * (b.read().float() @ a.read().float())

        return Deferred(weight.shape, read)

    return {f"{name}.weight": summed(name) for name, _, _ in _linears(language)}


def _linears(language: LanguageConfig) -> list[tuple[str, str, str]]:
    """Name, inputs and outputs of the linear layers of all MLPs."""
    return [
        (f"model.layers.{block}.mlp.{kind}_proj", *axes)
        for block in range(language.blocks)
        for kind, axes in (
            ("gate", ("hidden", "ffn")),
            ("up", ("hidden", "ffn")),
            ("down", ("ffn", "hidden")),
        )
    ]
