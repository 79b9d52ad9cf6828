"""The readers, each with a small right file to be spoilt."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import partial
from io import StringIO
from pathlib import Path

import torch
from safetensors.torch import save_file

from data_pipeline.import_uni_moe import import_uni_moe
from data_pipeline.importers.media_places import MediaPlaces
from data_pipeline.importers.uni_moe_json import RecordReader
from tests.checkpoints import small_gguf
from tests.checkpoints.small_folders import Model
from tests.media import picture, sound
from unimoe_mcore.checkpoints.artefact import read_manifest
from unimoe_mcore.checkpoints.based import write_base
from unimoe_mcore.checkpoints.gguf_file import read_gguf
from unimoe_mcore.checkpoints.hf_folder import read_folder
from unimoe_mcore.checkpoints.importing import import_model
from unimoe_mcore.checkpoints.official_experts import read_expert
from unimoe_mcore.checkpoints.published import Published
from unimoe_mcore.checkpoints.store import ShardReader
from unimoe_mcore.config.model import LanguageConfig

SHAPE = LanguageConfig(blocks=2, hidden=64, ffn=96, heads=4, kv_heads=2, vocabulary=320)


@dataclass(frozen=True)
class Reader:
    """A reader of strangers' files.

    Attributes:
        make: writes what is right into a folder.
        read: reads everything in such a folder.
    """

    make: Callable[[Path], object]
    read: Callable[[Path], None]


def _all_of(published: Published) -> None:
    for tensor in import_model(published, "it").tensors.values():
        tensor.read()


def _folder(folder: Path) -> None:
    _all_of(read_folder(folder))


def _gguf(folder: Path) -> None:
    _all_of(read_gguf(folder / "small.gguf"))


def _base(folder: Path) -> None:
    read_manifest(folder, "The base")
    stored = ShardReader(folder)
    for name in stored.tensors:
        stored.read(name)


def _expert(folder: Path) -> None:
    part = read_expert(folder / "mlp.safetensors", SHAPE, folder / "0_mlp_experts.bin")
    for tensor in part.tensors.values():
        tensor.read()


def _released(folder: Path) -> None:
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        reader = RecordReader("it", "speech", MediaPlaces([folder / "media"], []))
        import_uni_moe(folder / "records.json", folder / "set", reader, leave_out=100)


def _make(form: str, folder: Path) -> None:
    Model().write(folder, form)


def _make_gguf(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    small_gguf.write(folder / "small.gguf", *small_gguf.small())


def _make_base(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as source:
        published = read_folder(Model().write(Path(source)))
        write_base(folder, published, import_model(published, "it"), torch.bfloat16, "it")


def _make_expert(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    weights, halves = {}, {}
    for block in range(SHAPE.blocks):
        for kind, rows, columns in (("gate", 96, 64), ("up", 96, 64), ("down", 64, 96)):
            name = f"model.layers.{block}.mlp.{kind}_proj"
            weights[f"{name}.weight"] = torch.ones(rows, columns)
            halves[f"{name}_lora_A.weight"] = torch.ones(8, columns)
            halves[f"{name}_lora_B.weight"] = torch.ones(rows, 8)
    save_file(weights, folder / "mlp.safetensors")
    torch.save(halves, folder / "0_mlp_experts.bin")


def _make_released(folder: Path) -> None:
    (folder / "media").mkdir(parents=True, exist_ok=True)
    (folder / "media" / "a.jpg").write_bytes(picture().data)
    (folder / "media" / "b.wav").write_bytes(sound().data)
    turns = [{"from": "human", "value": "<image>\n<audio>"}, {"from": "gpt", "value": "yes"}]
    text = [{"from": "human", "value": "and?"}, {"from": "gpt", "value": "no"}]
    seen = {"image": "a.jpg", "voice": ["b.wav"], "video": ["a.jpg", "a.jpg"]}
    clip = [{"from": "human", "value": "<video>\n<image>\n<audio>"}, *turns[1:]]
    records = [
        {"image": "a.jpg", "voice": ["b.wav"], "conversations": turns},
        {**seen, "conversations": clip},
        {"conversations": text},
    ]
    (folder / "records.json").write_text(json.dumps(records))


READERS = {
    "safetensors": Reader(partial(_make, "safetensors"), _folder),
    "safetensors in pieces": Reader(partial(_make, "safetensors, sharded"), _folder),
    "torch.save": Reader(partial(_make, "bin"), _folder),
    "torch.save in pieces": Reader(partial(_make, "bin, sharded"), _folder),
    "GGUF": Reader(_make_gguf, _gguf),
    "our own base": Reader(_make_base, _base),
    "Uni-MoE's expert": Reader(_make_expert, _expert),
    "Uni-MoE's JSON": Reader(_make_released, _released),
}
