"""Folders of Hugging Face's form: read in every form alike, or refused in one sentence."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from torch import Tensor

from data_pipeline.errors import DataError
from tests.checkpoints.small_folders import HIDDEN, ROWS, Model
from tests.checkpoints.small_gguf import SPECIAL
from tests.checkpoints.small_tokenizer import tokenizer
from unimoe_mcore.checkpoints import hf_tokenizer, safetensors_file
from unimoe_mcore.checkpoints.hf_folder import read_folder
from unimoe_mcore.checkpoints.importing import Imported, import_model
from unimoe_mcore.config.errors import UserError

FORMS = ("safetensors", "safetensors, sharded", "bin", "bin, sharded")


def imported(folder: Path) -> Imported:
    return import_model(read_folder(folder), str(folder))


def test_every_form_of_a_folder_gives_the_same_tensors(tmp_path: Path) -> None:
    found = [imported(Model().write(tmp_path / form, form)).tensors for form in FORMS]
    assert len(found[0]) == 2 + 1 + 2 * 6
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        for name, tensor in found[0].items():
            assert torch.equal(tensor.read(), other[name].read())
            assert tensor.read().shape == tensor.shape


def test_a_vocabulary_is_filled_up_with_zeros(tmp_path: Path) -> None:
    model = Model()
    published = read_folder(model.write(tmp_path))
    language = published.language
    assert (language.vocabulary, language.unpadded_vocabulary) == (320, ROWS)
    rows = import_model(published, "it").tensors["language_model.output_layer.weight"].read()
    assert torch.equal(rows[:ROWS], model.tensors["lm_head.weight"])
    assert len(rows) == 320
    assert not rows[ROWS:].any()


def test_markers_without_spare_tokens_take_rows_that_fill_up(tmp_path: Path) -> None:
    model = Model(tokenizer=tokenizer(SPECIAL[:3]))
    tokens = model.tokenizer.get_vocab_size()
    model.config["vocab_size"] = tokens
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        model.tensors[name] = model.tensors[name][:tokens]
    published = read_folder(model.write(tmp_path))
    assert sorted(published.tokenizer.markers.values()) == list(range(tokens, tokens + 4))
    assert published.language.unpadded_vocabulary == tokens


def test_what_is_left_out_has_a_reason(tmp_path: Path) -> None:
    model = Model()
    model.config["tie_word_embeddings"] = True
    model.tensors["lm_head.weight"] = model.tensors["model.embed_tokens.weight"].clone()
    model.tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    found = imported(model.write(tmp_path))
    assert found.skipped == {
        "lm_head.weight": "the embedding again, which is also the output layer",
        "model.layers.0.self_attn.rotary_emb.inv_freq": "computed from config.json",
    }


def llava() -> Model:
    """The form of LLaVA 1.5's own files."""
    model = Model()
    model.config |= {
        "model_type": "llava_llama",
        "mm_projector_type": "mlp2x_gelu",
        "mm_hidden_size": 32,
        "mm_vision_select_layer": -2,
        "mm_use_im_start_end": False,
    }
    for layer, width in ((0, 32), (2, HIDDEN)):
        model.tensors[f"model.mm_projector.{layer}.weight"] = torch.randn(HIDDEN, width)
        model.tensors[f"model.mm_projector.{layer}.bias"] = torch.randn(HIDDEN)
    tower = "model.vision_tower.vision_tower.vision_model.embeddings."
    model.tensors[tower + "position_ids"] = torch.arange(5)
    model.tensors[tower + "class_embedding"] = torch.ones(8)
    return model


@pytest.mark.parametrize("form", FORMS)
def test_a_projector_is_a_connector_beside_the_base(form: str, tmp_path: Path) -> None:
    model = llava()
    found = imported(model.write(tmp_path, form))
    ((part, tensors),) = found.parts
    assert (part.folder, part.kind) == ("connector-image", "align")
    for layer in (0, 2):
        for kind in ("weight", "bias"):
            values = tensors.pop(f"connector.image.project.{layer}.{kind}").read()
            assert torch.equal(values, model.tensors[f"model.mm_projector.{layer}.{kind}"])
    assert not tensors
    assert found.tensors.keys() == imported(Model().write(tmp_path / "plain")).tensors.keys()
    assert set(found.skipped.values()) == {
        "the vision tower: encoders come from their own packages"
    }


def test_a_projector_that_no_connector_can_hold_is_refused(tmp_path: Path) -> None:
    for number, (key, value, words) in enumerate(
        (
            ("mm_projector_type", "linear", "its projector is linear in config.json"),
            ("mm_hidden_size", 64, r"mm_projector.0.weight is \[64, 32\], not \[64, 64\]"),
            ("mm_use_im_start_end", True, "mm_use_im_start_end of config.json is True"),
            ("moe", True, "moe of config.json is True"),
        )
    ):
        model = llava()
        model.config[key] = value
        with pytest.raises(UserError, match=words):
            imported(model.write(tmp_path / str(number)))
    model = llava()
    del model.tensors["model.mm_projector.2.bias"]
    with pytest.raises(UserError, match="model.mm_projector.2.bias is missing"):
        imported(model.write(tmp_path / "lacking"))


type Change = Callable[[Model], object]


def said(key: str, value: Any) -> Change:
    return lambda model: model.config.update({key: value})


def silent(key: str) -> Change:
    return lambda model: model.config.pop(key)


def lacking(name: str) -> Change:
    return lambda model: model.tensors.pop(name)


def added(name: str, value: Tensor) -> Change:
    return lambda model: model.tensors.update({name: value})


def rope(**facts: Any) -> Change:
    return said("rope_scaling", facts)


NORM = "model.norm.weight"
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64}
CHANGED: dict[str, Change] = {
    "attention_bias of config.json is True": said("attention_bias", True),
    "mlp_bias of config.json is True": said("mlp_bias", True),
    "hidden_act of config.json is gelu": said("hidden_act", "gelu"),
    "partial_rotary_factor of config.json is 0.5": said("partial_rotary_factor", 0.5),
    "head_dim is 32, not hidden_size / heads = 16": said("head_dim", 32),
    "sliding_window is 64, less than max_position_embeddings=128": said("sliding_window", 64),
    "quantization_config of config.json is {'bits': 4}": said("quantization_config", {"bits": 4}),
    "auto_map of config.json": said("auto_map", {"AutoModel": "x.py"}),
    "num_local_experts of config.json is 8": said("num_local_experts", 8),
    "final_logit_softcapping of config.json is 30.0": said("final_logit_softcapping", 30.0),
    "residual_multiplier of config.json is 0.2": said("residual_multiplier", 0.2),
    "layer_types of config.json has other layers": said("layer_types", ["sliding_attention"]),
    "it is a qwen2, which .*: its queries, keys and values have biases": said(
        "model_type", "qwen2"
    ),
    "it is a bert, known are llama, mistral": said("model_type", "bert"),
    "it lacks model_type": silent("model_type"),
    "it lacks hidden_size": silent("hidden_size"),
    "it lacks rms_norm_eps": silent("rms_norm_eps"),
    "hidden_size is '64', no number|hidden_size is 64, no number": said("hidden_size", "64"),
    "num_hidden_layers is 0, no whole number": said("num_hidden_layers", 0),
    "it says 1000000 blocks, and has 21 tensors": said("num_hidden_layers", 1_000_000),
    "its 4 heads cannot share 3": said("num_key_value_heads", 3),
    "its width 64 is not 5 heads": said("num_attention_heads", 5),
    "tie_word_embeddings is 1, neither true nor false": said("tie_word_embeddings", 1),
    "rms_norm_eps is 0": said("rms_norm_eps", 0),
    "rope_theta is -1, no number greater than 0": said("rope_theta", -1),
    r"are scaled \(yarn\), known are default, linear, llama3": rope(rope_type="yarn", factor=2.0),
    r"are scaled \(dynamic\)": rope(type="dynamic", factor=2.0),
    "it lacks factor": rope(type="linear"),
    "it lacks low_freq_factor": rope(**LLAMA3),
    "low_freq_factor is not less than": rope(**LLAMA3, low_freq_factor=4.0, high_freq_factor=4.0),
    r"beta_fast is not known of rotary positions \(linear\)": rope(
        type="linear", factor=2.0, beta_fast=32
    ),
    "rope_scaling and rope_parameters differ": lambda model: model.config.update(
        rope_scaling={"type": "linear", "factor": 2.0}, rope_parameters={"rope_theta": 1e4}
    ),
    "model.norm.weight is missing": lacking(NORM),
    "lm_head.weight is missing": lacking("lm_head.weight"),
    r"model.norm.weight is \[32\], not \[64\]": added(NORM, torch.ones(32)),
    "model.norm.weight has no floating-point numbers": added(
        NORM, torch.ones(64, dtype=torch.int8)
    ),
    "model.layers.0.self_attn.q_proj.bias is not known": added(
        "model.layers.0.self_attn.q_proj.bias", torch.ones(HIDDEN)
    ),
    "model.layers.2.mlp.up_proj.weight is not known": added(
        "model.layers.2.mlp.up_proj.weight", torch.ones(2, 2)
    ),
    "lm_head.weight is not the embedding, but the two": said("tie_word_embeddings", True),
    "its 267 tokens are more than vocab_size=200": said("vocab_size", 200),
}


@pytest.mark.parametrize("words", CHANGED)
def test_another_model_is_refused_in_a_sentence(words: str, tmp_path: Path) -> None:
    model = Model()
    CHANGED[words](model)
    with pytest.raises(UserError, match=rf"^\S+ cannot be used: .*({words}).*\.$") as caught:
        imported(model.write(tmp_path / "model"))
    assert str(caught.value).isprintable()


def test_a_tokenizer_that_does_not_fit_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Model(tokenizer=tokenizer(("<s>", "</s>"))).write(tmp_path)
    with pytest.raises(DataError, match="structural tokens of no known chat template"):
        read_folder(folder)
    with pytest.raises(DataError, match="no chat template 'none': choose one of plain-1, chatml-1"):
        read_folder(Model().write(tmp_path), "none")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="it has neither tokenizer.json nor tokenizer.model"):
        read_folder(folder)
    (folder / "tokenizer.model").write_bytes(b"no model")
    with pytest.raises(UserError, match=r"tokenizer.model cannot be read \("):
        read_folder(folder)
    with monkeypatch.context() as patched:
        patched.setattr(hf_tokenizer, "find_spec", lambda name: None)
        with pytest.raises(UserError, match="has only tokenizer.model: pip install sentencepiece"):
            read_folder(folder)


def test_a_sentencepiece_model_is_read_as_its_own_library_reads_it(tmp_path: Path) -> None:
    model = io.BytesIO()
    texts = ("USER: Which bird is this? ASSISTANT: a robin", "the quick brown fox   in 1999")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts * 20),
        model_writer=model,
        model_type="bpe",
        vocab_size=340,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        minloglevel=2,
    )
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    found = hf_tokenizer.read_tokenizer(tmp_path)
    theirs = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    assert found.get_vocab_size() == theirs.get_piece_size()
    for text in (*texts, "a fox: 19 birds", "Ähre, \u4e2d"):
        assert found.encode(text, add_special_tokens=False).ids == theirs.encode(text)


def header(text: bytes, body: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def entry(start: int, stop: int, shape: str = "[2]") -> bytes:
    return b'{"dtype":"F32","shape":%s,"data_offsets":[%d,%d]}' % (shape.encode(), start, stop)


SPOILT = {
    "its header says it is 1099511627776 bytes long": header(b"{}", length=1 << 40),
    "its header is no JSON that can be read": header(b'{"x":' * 100_000),
    "its header is no JSON object": header(b"[]"),
    "it has 'x' twice": header(b'{"x":%b,"x":%b}' % (entry(0, 8), entry(0, 8)), bytes(8)),
    "invalid offset for tensor `y`": header(
        b'{"x":%b,"y":%b}' % (entry(0, 8), entry(4, 12)), bytes(12)
    ),
    "file not fully covered": header(b'{"x":%b}' % entry(0, 8), bytes(4)),
    "overflow": header(b'{"x":%b}' % entry(0, 8, "[8589934592, 8589934592]"), bytes(8)),
    "no whole safetensors file": b"",
}


@pytest.mark.parametrize("words", SPOILT)
def test_what_a_header_declares_is_not_believed(words: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(SPOILT[words])
    with pytest.raises(UserError, match=rf"model.safetensors is no whole .*: .*{words}|{words}"):
        safetensors_file.read_safetensors(path)


def test_a_cut_file_is_refused(tmp_path: Path) -> None:
    folder = Model().write(tmp_path)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="model.safetensors is no whole safetensors file: "):
        read_folder(folder)


INDEXES: dict[str, Callable[[dict[str, Any]], Any]] = {
    r"names ../model.safetensors, which is no file of the folder": lambda places: places.update(
        {NORM: "../model.safetensors"}
    ),
    "names /etc/passwd, which is no file": lambda places: places.update({NORM: "/etc/passwd"}),
    "names 7, which is no file": lambda places: places.update({NORM: 7}),
    "names lost.safetensors, which is missing": lambda places: places.update(
        {NORM: "lost.safetensors"}
    ),
    "model.norm.weight is in model-0.safetensors, unlisted": lambda places: places.pop(NORM),
    "extra is not in model-0.safetensors": lambda places: places.update(
        {"extra": "model-0.safetensors"}
    ),
    "it has no weight_map": lambda places: places.clear(),
}


@pytest.mark.parametrize("words", INDEXES)
def test_an_index_that_is_wrong_is_refused(words: str, tmp_path: Path) -> None:
    folder = Model().write(tmp_path / "model", "safetensors, sharded")
    index = folder / "model.safetensors.index.json"
    facts = json.loads(index.read_text())
    INDEXES[words](facts["weight_map"])
    index.write_text(json.dumps(facts))
    with pytest.raises(UserError, match=rf"index.json .*{words}.*\.$"):
        read_folder(folder)


class _Code:
    """Its pickle would run a command."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {RAN}",)


RAN = Path("/tmp") / f"unimoe-import-ran-{os.getpid()}"


def _compressed(path: Path) -> None:
    """The same archive, compressed, with a member of zeros: a small file that is large unpacked."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
        archive.writestr("pytorch_model/data/99", bytes(1 << 24))


def _with_member(path: Path) -> None:
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("../evil", b"")


def _overlapping(path: Path) -> None:
    """Two entries of the list say the same bytes."""
    data = bytearray(path.read_bytes())
    places = [i for i in range(len(data)) if data[i : i + 4] == b"PK\x01\x02"]
    first, second = places[1] + 42, places[2] + 42
    data[second : second + 4] = data[first : first + 4]
    path.write_bytes(data)


def _expanded(path: Path) -> None:
    tensors = {**Model().tensors, NORM: torch.ones(1).expand(1 << 40)}
    torch.save(tensors, path)


BINS: dict[str, Callable[[Path], object]] = {
    "its pickle asks for .*system": lambda path: torch.save({"x": _Code()}, path),
    "it is no zip archive .a form older than PyTorch 1.6.*save it again as safetensors": (
        lambda path: torch.save(Model().tensors, path, _use_new_zipfile_serialization=False)
    ),
    "it is no zip archive": lambda path: path.write_bytes(pickle.dumps({"x": _Code()})),
    "is compressed": _compressed,
    "its member ../evil is not known": _with_member,
    "share bytes|overlap": _overlapping,
    "it is cut off": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "model.norm.weight is no plain tensor": _expanded,
    "x is no plain tensor": lambda path: torch.save({"x": torch.ones(2).to_sparse()}, path),
    "holds no named tensors": lambda path: torch.save([torch.ones(2)], path),
}


@pytest.mark.parametrize("words", BINS)
def test_a_bin_file_that_is_no_archive_of_tensors_is_refused(words: str, tmp_path: Path) -> None:
    folder = Model().write(tmp_path, "bin")
    BINS[words](folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=rf"pytorch_model.bin .*({words}).*\.$") as caught:
        read_folder(folder)
    assert str(caught.value).isprintable()
    assert not RAN.exists()


def test_a_file_that_changes_is_refused(tmp_path: Path) -> None:
    found = imported(Model().write(tmp_path, "bin")).tensors
    other = Model()
    del other.tensors[NORM]
    other.write(tmp_path, "bin")
    with pytest.raises(UserError, match="model.norm.weight in .* cannot be read"):
        found["language_model.decoder.final_norm.weight"].read()
