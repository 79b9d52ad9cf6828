"""Each patch is needed: left out, Megatron fails as its docstring says; applied, it does not."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import pytest
import torch

from tests.distributed import run_distributed
from unimoe_mcore.runtime import cpu, without_te
from unimoe_mcore.runtime.adam import FusedAdam

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the patches are for the CPU")

# Two wordings each: torch built with CUDA, and torch built without.
NO_DRIVER = "RuntimeError: Found no NVIDIA driver|AssertionError: Torch not compiled with CUDA"
NO_STREAM = "AcceleratorError: CUDA error|RuntimeError: Tried to instantiate dummy base class"
NO_NCCL = "ValueError: ProcessGroupNCCL is only supported|RuntimeError: .*NCCL built in"

# patch -> (what happens without, what happens with); a str without is the pattern of an error.
EXPECTED: dict[str, tuple[Any, Any]] = {
    "patch_compile": ("InductorError: InvalidCxxCompiler", [0.0]),
    "patch_nccl_names": (NO_NCCL, "gloo"),
    "patch_streams": (NO_STREAM, "MoEAlltoAllTokenDispatcher"),
    "patch_cuda_rng": (NO_DRIVER, True),
    "patch_device_strings": (NO_DRIVER, pytest.approx(50**0.5)),
    "patch_tensor_type": ("TypeError: Wrapped parameters must be one of", "torch.float32"),
    "patch_rng_tracker": (
        {"own sequence": False, "outer untouched": False},
        {"own sequence": True, "outer untouched": True},
    ),
    "patch_rng_warning": (2, 1),
    "patch_hybrid_final_norm": ("ImportError: Transformer Engine is not installed", "LayerNorm"),
    "patch_adam": ("AssertionError", {"before": True, "steps": [1, 1]}),
}


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, dict[str, Any]]]:
    """The results of both ranks."""
    return run_distributed(
        "tests.runtime.cases_cpu_patches:ablate", processes=2, timeout=120, prepare=False
    )


def test_every_patch_has_a_case(ranks: list[dict[str, Any]]) -> None:
    patches = [patch.__name__ for patch in cpu.PATCHES + without_te.PATCHES]
    assert list(ranks[0]) == patches


@pytest.mark.parametrize("patch", EXPECTED)
def test_patch_is_needed_and_enough(patch: str, ranks: list[dict[str, Any]]) -> None:
    without, patched = EXPECTED[patch]
    for results in ranks:
        if isinstance(without, str):
            assert re.match(without, results[patch]["without"])
        else:
            assert results[patch]["without"] == without
        assert results[patch]["patched"] == patched


def test_current_device(ranks: list[dict[str, Any]]) -> None:
    for results in ranks:
        without = results["patch_current_device"]["without"]
        assert re.match(NO_DRIVER, without["layer"])
        assert without["checkpoint worker"].startswith("ZeroDivisionError")
        patched = results["patch_current_device"]["patched"]
        assert patched == {"layer": [6, 4], "checkpoint worker": "done"}


def test_expert_parallel_tokens_come_back(ranks: list[dict[str, Any]]) -> None:
    for results, tokens in zip(ranks, ([1.0, 2.0, 3.0], [11.0, 12.0]), strict=True):
        assert "TypeError: all_to_all_single()" in results["patch_moe_splits"]["without"]
        assert results["patch_moe_splits"]["patched"] == tokens


def test_uneven_gather_and_scatter(ranks: list[dict[str, Any]]) -> None:
    for results, mine in zip(ranks, ([0.0, 2.0, 4.0], [6.0, 8.0]), strict=True):
        case = results["patch_uneven_gather"]
        assert "ProcessGroupGloo::allgather: invalid tensor size" in case["without"]
        assert case["patched"] == [[0.0, 0.0, 0.0, 1.0, 1.0], mine]


def test_torch_norm_under_sequence_parallelism(ranks: list[dict[str, Any]]) -> None:
    case = ranks[0]["patch_torch_norm"]
    assert case["without"].startswith("AssertionError: sequence parallel not supported")
    assert case["patched"]["marked"] is True
    assert case["patched"]["eps"] == 1e-3
    assert case["patched"]["persistent"].startswith("AssertionError: persist_layer_norm")


def test_packed_rotation_is_bitwise_the_loop_and_faster(ranks: list[dict[str, Any]]) -> None:
    case = ranks[0]["patch_thd_rope"]
    assert case["without"]["calls"] == 101  # 50 sequences, twice, and once per-token frequencies
    assert case["patched"]["calls"] == 1  # only what is interleaved is left to Megatron
    assert case["patched"]["digests"] == case["without"]["digests"]
    assert case["patched"]["milliseconds"] < case["without"]["milliseconds"] / 2


def test_weight_gradients_go_to_their_buffers(ranks: list[dict[str, Any]]) -> None:
    case = ranks[0]["patch_weight_gradients"]
    assert case["without"].startswith("RuntimeError: ColumnParallelLinear was called with")
    assert case["patched"] == {
        "alone": [[1.0, 2.0]] * 3,
        "buffer": [[12.0, 14.0]] * 3,
        "grad": None,
    }


def test_gradients_are_clipped_at_once(ranks: list[dict[str, Any]]) -> None:
    case = ranks[0]["patch_multi_tensor"]
    wanted = {"norm": pytest.approx(10.0), "clipped": pytest.approx([6.0, 8.0])}
    assert case["without"] == {**wanted, "few waits": False}
    assert case["patched"] == {**wanted, "few waits": True}


def test_tokens_in_order_are_not_copied(ranks: list[dict[str, Any]]) -> None:
    case, (first, last) = ranks[0]["patch_chunk_order"], ([0.0], [3.0, 4.0, 5.0])
    ordered, moved = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0], [*last, *first, 1.0, 2.0]
    assert case["without"]["in order"] == [ordered, ordered, False]
    assert case["patched"]["in order"] == [ordered, ordered, True]
    assert case["patched"]["out of order"] == [moved, moved, False]
    assert case["patched"]["out of order"] == case["without"]["out of order"]


def test_gated_mlps_do_no_idle_work(ranks: list[dict[str, Any]]) -> None:
    case = ranks[0]["patch_gated_mlp"]
    assert (case["without"]["widest"], case["patched"]["widest"]) == (5 * 12, 5 * 2)
    assert case["without"]["idle"] > case["patched"]["idle"] == 0
    for before, after in zip(case["without"]["values"], case["patched"]["values"], strict=True):
        assert after == pytest.approx(before, rel=1e-12)


def test_preparing_is_repeatable_quiet_and_comes_before_megatron() -> None:
    program = """
import sys, torch
sys.modules["megatron.core"] = sys
from unimoe_mcore.runtime import cpu
from unimoe_mcore.runtime.devices import backend, device, prepare_device
try:
    prepare_device()
except RuntimeError as error:
    print(error)
try:
    cpu.install()
except RuntimeError as error:
    print(error)
torch.cuda.is_available = lambda: True
try:
    cpu.install()
except RuntimeError as error:
    print(error)
torch.cuda.is_available = lambda: False
del sys.modules["megatron.core"]
prepare_device()
lent = torch.cuda.current_device, torch.zeros
prepare_device()
cpu.install()
print(lent == (torch.cuda.current_device, torch.zeros), device(), backend())
import megatron.core.models.mimo.model.base
import warnings
warnings.warn("something else")
"""
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    assert ended.stdout.splitlines() == [
        "megatron.core was imported before prepare_device()",
        "megatron.core was imported before prepare_device()",
        "runtime.cpu must not be installed where there is a CUDA device",
        "True cpu gloo",
    ]
    # Of all that is remarked at import, only what is not Megatron's gets through.
    assert re.fullmatch(r"<string>:\d+: UserWarning: something else\n", ended.stderr)


@pytest.mark.parametrize("decoupled", [True, False])
def test_adam_is_torchs_adam(decoupled: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.rand(5, 3, generator=generator)
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    idle = torch.nn.Parameter(torch.ones(2))
    settings: dict[str, Any] = {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.1}
    adam = FusedAdam([ours, idle], adam_w_mode=decoupled, **settings)
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    reference = kind([theirs], **settings)
    for step in range(6):
        ours.grad = torch.rand(5, 3, generator=generator) - 0.5
        theirs.grad = ours.grad.clone()
        adam.step()
        reference.step()
        torch.testing.assert_close(ours, theirs)
        if step == 2:  # stop and go on from what was saved
            saved = adam.state_dict()
            adam = FusedAdam([ours, idle], adam_w_mode=decoupled)
            adam.load_state_dict(saved)
    assert adam.param_groups[0]["step"] == 6
    assert set(adam.state[ours]) == {"exp_avg", "exp_avg_sq"}
    assert torch.equal(idle, torch.ones(2))


def test_adam_counts_no_steps_without_parameters() -> None:
    adam = FusedAdam([{"params": []}, {"params": [torch.nn.Parameter(torch.ones(1))]}])
    adam.step()
    assert ["step" in group for group in adam.param_groups] == [False, True]


def test_adam_refuses_cuda_graphs() -> None:
    with pytest.raises(ValueError, match="optimizer_cuda_graph"):
        FusedAdam([torch.nn.Parameter(torch.ones(1))], capturable=True)
