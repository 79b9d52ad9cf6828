"""GGUF files that cannot be a base: hostile, cut, or of another model; each refused."""

from __future__ import annotations

import random
import struct
import time
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from data_pipeline.errors import DataError
from tests.checkpoints.small_gguf import HEAD, HIDDEN, Facts, Tensors, small, write
from unimoe_mcore.checkpoints import gguf_header
from unimoe_mcore.checkpoints.gguf_file import read_gguf
from unimoe_mcore.checkpoints.importing import Imported, import_model
from unimoe_mcore.config.errors import UserError


def imported(path: Path) -> Imported:
    return import_model(read_gguf(path), str(path))


def file(tensors: int = 0, keys: int = 0, rest: bytes = b"", version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + rest


def text(said: bytes) -> bytes:
    return struct.pack("<Q", len(said)) + said


def tensor(name: bytes, sizes: list[int], kind: int = 0, offset: int = 0) -> bytes:
    form = f"<I{len(sizes)}QIQ"
    return text(name) + struct.pack(form, len(sizes), *sizes, kind, offset)


NESTED = struct.pack("<IIQ", 9, 9, 1) + struct.pack("<IQ", 9, 1) * 2000
HOSTILE = {
    "a list of 2 ** 40": (
        file(0, 1, text(b"x") + struct.pack("<IIQ", 9, 0, 2**40)),
        "more than 4194304 elements",
    ),
    "many lists": (
        file(0, 9, b"".join(text(b"%d" % n) + struct.pack("<IIQ", 9, 8, 2**21) for n in range(9))),
        "its header ends early",
    ),
    "a long text": (file(0, 1, text(b"x") + struct.pack("<IQ", 8, 2**63)), "its header ends early"),
    "lists in lists": (file(0, 1, text(b"x") + NESTED), "it has lists of lists"),
    "many keys": (file(0, 2**63), "its header ends early"),
    "many tensors": (file(2**63), "its header ends early"),
    "many axes": (file(1, 0, text(b"x") + struct.pack("<I", 2**31)), "x has 2147483648 axes"),
    "sizes that overflow": (
        file(1, 0, tensor(b"x", [2**33, 2**33])),
        "x ends behind the file's end",
    ),
    "an offset that overflows": (
        file(1, 0, tensor(b"x", [32], offset=2**64 - 32)),
        "x ends behind the file's end",
    ),
    "no size": (file(1, 0, tensor(b"x", [0])), r"x cannot be \[0\] in F32"),
    "half a block": (file(1, 0, tensor(b"x", [33], kind=2)), r"x cannot be \[33\] in Q4_0"),
    "shared bytes": (
        file(2, 0, tensor(b"x", [4]) + tensor(b"y", [4], offset=8) + bytes(64)),
        "x and y share bytes",
    ),
    "a tensor twice": (
        file(2, 0, tensor(b"x", [4]) + tensor(b"x", [4], offset=32) + bytes(99)),
        "it has x twice",
    ),
    "a key twice": (file(0, 2, (text(b"x") + struct.pack("<IB", 0, 1)) * 2), "it has x twice"),
    "a name of two lines": (
        file(0, 1, text(b"x\ny") + struct.pack("<IB", 0, 1)),
        "a name that is none",
    ),
    "no alignment": (
        file(0, 1, text(b"general.alignment") + struct.pack("<II", 4, 0)),
        "general.alignment is no power of two",
    ),
    "another version": (file(version=1), "its version is 1, known are 2, 3"),
    "nothing": (b"", "its header ends early"),
    "something else": (b"no model", "it does not begin with GGUF"),
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", HOSTILE)
def test_what_a_file_declares_is_not_believed(name: str, tmp_path: Path) -> None:
    data, words = HOSTILE[name]
    path = tmp_path / "hostile.gguf"
    path.write_bytes(data)
    with pytest.raises(UserError, match=rf"hostile.gguf is no whole GGUF file: .*{words}.*\.$"):
        read_gguf(path)


def test_a_long_header_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_header, "MOST_HEADER", 1000)
    with pytest.raises(UserError, match="is longer than 1000 bytes"):
        read_gguf(write(tmp_path / "small.gguf", *small()))


@pytest.mark.timeout(60)
def test_spoilt_files_are_read_or_refused_in_a_sentence(tmp_path: Path) -> None:
    """Cut anywhere, and with bytes of the header changed at random."""
    path = write(tmp_path / "small.gguf", *small())
    whole = path.read_bytes()
    start = min(each.start for each in gguf_header.read_header(path).tensors.values())
    chosen = random.Random(0)
    spoilt = [whole[:end] for end in (*range(0, start, 97), start, len(whole) - 1)]
    for number in range(400):
        data = bytearray(whole)
        for _ in range(1 + number % 3):
            data[chosen.randrange(start)] = chosen.choice([0, 1, 255, chosen.randrange(256)])
        spoilt.append(bytes(data))
    said = []
    for data in spoilt:
        path.write_bytes(data)
        began = time.monotonic()
        try:
            imported(path)
        except (UserError, DataError) as error:
            said.append(str(error))
        assert time.monotonic() - began < 10
    assert len(said) > len(spoilt) // 2
    assert [each for each in said if not each.isprintable() or len(each) > 1000] == []


def changed(key: str, value: object) -> Callable[[Facts, Tensors], None]:
    def change(facts: Facts, tensors: Tensors) -> None:
        facts[key] = value

    return change


def without(key: str) -> Callable[[Facts, Tensors], None]:
    def change(facts: Facts, tensors: Tensors) -> None:
        facts.pop(key, None)
        tensors.pop(key, None)

    return change


def added(
    name: str, shape: tuple[int, ...], kind: str = "F32", values: np.ndarray | None = None
) -> Callable[[Facts, Tensors], None]:
    def change(facts: Facts, tensors: Tensors) -> None:
        tensors[name] = (np.ones(shape, np.float32) if values is None else values), kind

    return change


def _token_types(facts: Facts, tensors: Tensors) -> None:
    facts["tokenizer.ggml.token_type"].pop()


def _tokens_twice(facts: Facts, tensors: Tensors) -> None:
    facts["tokenizer.ggml.tokens"][-1] = "he"


MUTATED = {
    "its width 64 is not 5 heads": changed("llama.attention.head_count", 5),
    "llama.attention.head_count is 0, no whole number": changed("llama.attention.head_count", 0),
    "llama.attention.head_count is 'two'|head_count is two": changed(
        "llama.attention.head_count", "two"
    ),
    r"head_count is \[4, 4\], no number": changed("llama.attention.head_count", [4, 4]),
    "its width 64 is not 64 heads": changed("llama.attention.head_count", 64),
    "its 4 heads cannot share 3 key/value heads": changed("llama.attention.head_count_kv", 3),
    "head_count_kv is 0": changed("llama.attention.head_count_kv", 0),
    "llama.rope.dimension_count is 8": changed("llama.rope.dimension_count", 8),
    "it says 2000000000 blocks, and has 20 tensors": changed("llama.block_count", 2_000_000_000),
    "it lacks llama.block_count": without("llama.block_count"),
    "it lacks tokenizer.ggml.tokens": without("tokenizer.ggml.tokens"),
    "llama.rope.freq_base is 0.0, no number greater": changed("llama.rope.freq_base", 0.0),
    "llama.rope.freq_base is nan": changed("llama.rope.freq_base", float("nan")),
    "llama.attention.layer_norm_rms_epsilon is 0.0": changed(
        "llama.attention.layer_norm_rms_epsilon", 0.0
    ),
    "it holds a phi3, only llama": changed("general.architecture", "phi3"),
    "it is a mixture of experts": changed("llama.expert_count", 8),
    r"are scaled \(yarn\)": changed("llama.rope.scaling.type", "yarn"),
    r"are scaled \(linear\)": changed("llama.rope.scaling.type", "linear"),
    r"are scaled \(llama.rope.scaling.factor is 4.0\)": changed("llama.rope.scaling.factor", 4.0),
    r"are scaled \(llama.rope.scale_linear is 2.0\)": changed("llama.rope.scale_linear", 2.0),
    "rope_freqs.weight scales the rotary positions": added(
        "rope_freqs.weight", (), values=np.linspace(1, 8, HEAD // 2, dtype=np.float32)
    ),
    "its tokenizer is llama / smollm": changed("tokenizer.ggml.model", "llama"),
    "tokenizer.ggml.merges is no list of str": changed("tokenizer.ggml.merges", "h e"),
    "the merge h q is not one of two tokens": changed("tokenizer.ggml.merges", ["h e", "h q"]),
    "the merge he is not one of two tokens": changed("tokenizer.ggml.merges", ["he"]),
    "tokens have 266 types": _token_types,
    "has a token twice": _tokens_twice,
    "blk.0.attn_sinks.weight is not known": added("blk.0.attn_sinks.weight", (HIDDEN, HIDDEN)),
    "blk.1.attn_q.bias is not known": added("blk.1.attn_q.bias", (HIDDEN,)),
    "unnamed is not known": added("unnamed", (HIDDEN,)),
    # Transformers' own names would take the place of GGUF's.
    "model.embed_tokens.weight is not known": added("model.embed_tokens.weight", (HIDDEN,)),
    "blk.00.ffn_norm.weight is not known": added("blk.00.ffn_norm.weight", (HIDDEN,)),
    "model.layers.2.input_layernorm.weight is not known": added("blk.2.attn_norm.weight", (64,)),
    "model.norm.weight is missing": without("output_norm.weight"),
    r"model.norm.weight is \[32\], not \[64\]": added("output_norm.weight", (32,)),
    "output_norm.weight is in F64, which cannot be unpacked": added(
        "output_norm.weight", (), "F64", np.ones(HIDDEN)
    ),
    "blk.0.ffn_norm.weight is in I8, which cannot be unpacked": added(
        "blk.0.ffn_norm.weight", (), "I8", np.ones(HIDDEN, np.int8)
    ),
}


@pytest.mark.parametrize("words", MUTATED)
def test_another_model_is_refused_in_a_sentence(words: str, tmp_path: Path) -> None:
    facts, tensors = small()
    MUTATED[words](facts, tensors)
    path = write(tmp_path / "other.gguf", facts, tensors)
    with pytest.raises(UserError, match=rf"^\S*other.gguf cannot be used: .*({words}).*\.$"):
        imported(path)


def test_many_problems_are_one_sentence(tmp_path: Path) -> None:
    facts, tensors = small()
    tensors |= {f"odd.{n}": (np.ones(32, np.float32), "F32") for n in range(100)}
    with pytest.raises(UserError, match="odd.0 is not known; odd.1 .*; and 88 more.$"):
        imported(write(tmp_path / "odd.gguf", facts, tensors))


def test_factors_of_1_scale_nothing_and_are_left_out(tmp_path: Path) -> None:
    facts, tensors = small()
    tensors["rope_freqs.weight"] = np.ones(HEAD // 2, np.float32), "F32"
    facts |= {"llama.rope.scaling.type": "none", "llama.rope.scale_linear": 1.0}
    found = imported(write(tmp_path / "ones.gguf", facts, tensors))
    assert found.skipped == {"rope_freqs.weight": "all its factors are 1"}


def test_values_are_those_of_the_gguf_package_read_when_wanted(tmp_path: Path) -> None:
    path = write(tmp_path / "small.gguf", *small(tied=False))
    found = gguf_header.read_header(path)
    theirs = gguf.GGUFReader(path)
    assert [each.name for each in theirs.tensors] == list(found.tensors)
    for each in theirs.tensors:
        values = gguf.dequantize(each.data, each.tensor_type)
        assert np.array_equal(gguf_header.read_values(path, found.tensors[each.name]), values)
    for name, field in theirs.fields.items():
        assert name.startswith("GGUF.") or found.facts[name] == field.contents()
    laid_out = imported(path)
    path.write_bytes(path.read_bytes()[:6000])
    with pytest.raises(UserError, match=r"output_norm.weight in .* cannot be read"):
        laid_out.tensors["language_model.decoder.final_norm.weight"].read()
