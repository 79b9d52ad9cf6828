"""``python -m unimoe_mcore.doctor``: what this machine has, what will be used of it, and why.

Ends with 0 if the project can run here, with 1 if something that it needs is missing.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

MEGATRON = "0.19.2"
"""The only version that ``runtime.cpu`` fits."""

PACKAGES = (
    "torch",
    "megatron-core",
    "transformers",
    "hydra-core",
    "omegaconf",
    "psutil",
    "numpy",
    "av",
    "soundfile",
    "pillow",
)
"""What every run imports. psutil is Megatron's checkpoint writer's, which does not declare it."""


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        subject: what was looked at.
        value: what was found.
        reason: why it is so or what to do about it; may be empty.
        good: False if the project cannot run this way.
    """

    subject: str
    value: str
    reason: str = ""
    good: bool = True


def main() -> int:
    """Print the report; the exit status is 1 if anything in it is not good."""
    findings = print_section("Machine", look_at_machine)
    findings += print_section("Packages", look_at_packages)
    if all(finding.good for finding in findings):
        findings += print_section("Kernels", look_at_kernels)
        findings += print_section("Self-test", run_self_test)
    bad = sum(not finding.good for finding in findings)
    print(f"\nMend first what is marked with !: {bad}." if bad else "\nReady.")
    return 1 if bad else 0


def print_section(title: str, look: Callable[[], list[Finding]]) -> list[Finding]:
    """Print what ``look`` finds, a line each in three columns, and return it."""
    print(f"\n{title}", flush=True)
    findings = look()
    for finding in findings:
        line = f"  {finding.subject:<24}{finding.value:<22}{finding.reason}".rstrip()
        print(line if finding.good else f"! {line[2:]}", flush=True)
    return findings


def look_at_machine() -> list[Finding]:
    """Python, cores and memory."""
    right = sys.version_info[:2] == (3, 12)
    findings = [
        Finding(
            "Python",
            platform.python_version(),
            "" if right else "Megatron-Core and this project are pinned to Python 3.12",
            right,
        ),
        Finding("cores", str(_usable_cores()), f"{os.cpu_count()} in the machine"),
        Finding("threads", os.environ.get("OMP_NUM_THREADS", "1"), "per process, OMP_NUM_THREADS"),
    ]
    if importlib.util.find_spec("psutil") is not None:
        import psutil

        memory = psutil.virtual_memory()
        free = f"{memory.available / 2**30:.1f} GiB free"
        findings.append(Finding("memory", f"{memory.total / 2**30:.1f} GiB", free))
    return findings


def look_at_packages() -> list[Finding]:
    """The version of every required package, and whether it is there."""
    return [_look_at_package(name) for name in PACKAGES]


def look_at_kernels() -> list[Finding]:
    """Every choice of ``runtime.capabilities`` and the number format, each with its reason."""
    from unimoe_mcore.runtime.capabilities import detect, probe_apex
    from unimoe_mcore.runtime.devices import backend
    from unimoe_mcore.runtime.precision import choose_precision

    chosen = detect()
    findings = []
    for field in dataclasses.fields(chosen):
        choice = getattr(chosen, field.name)
        words = {True: "yes", False: "no"}.get(choice.value, choice.value)
        findings.append(Finding(field.name.replace("_", " "), str(words), choice.reason))
    apex = probe_apex()
    if "not NVIDIA's" in apex.reason:
        findings.append(Finding("apex", "wrong package", apex.reason, good=False))
    precision = choose_precision("auto")
    findings.append(Finding("precision", precision.value, f"{precision.reason}; 'auto' takes it"))
    findings.append(Finding("communication", backend(), "NCCL between GPUs, else gloo"))
    return findings


def run_self_test() -> list[Finding]:
    """One process group, and one forward and backward pass of a small mixture of experts."""
    try:
        start = time.perf_counter()
        gradients = _train_small_mixture()
        took = f"{gradients} gradients, {time.perf_counter() - start:.1f} s with imports"
        return [Finding("process group", "works"), Finding("mixture of experts", "trains", took)]
    except Exception as error:  # whatever it is, it is what the user came to hear
        return [Finding("self-test", "failed", f"{type(error).__name__}: {error}", good=False)]


def _usable_cores() -> int | None:
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    return len(affinity(0)) if affinity else os.cpu_count()


def _look_at_package(name: str) -> Finding:
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, "missing", "pip install -r requirements.txt", good=False)
    if name == "megatron-core" and version != MEGATRON:
        return Finding(name, version, f"pip install megatron-core=={MEGATRON}", good=False)
    return Finding(name, version)


def _train_small_mixture() -> int:
    """Forward and backward through four experts; returns how many parameters have a gradient."""
    from unimoe_mcore.config.parallel import ParallelConfig
    from unimoe_mcore.runtime.capabilities import detect, transformer_flags
    from unimoe_mcore.runtime.devices import device, prepare_device
    from unimoe_mcore.runtime.groups import destroy, initialise

    prepare_device()
    os.environ.pop("WORLD_SIZE", None)  # alone, also within a torchrun
    groups = initialise(ParallelConfig(), seed=1)
    import torch
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    total = torch.ones(1, device=device())
    torch.distributed.all_reduce(total)
    capabilities = detect()
    config = TransformerConfig(
        num_layers=1,
        hidden_size=16,
        num_attention_heads=1,
        num_moe_experts=4,
        moe_router_topk=2,
        moe_ffn_hidden_size=32,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        **transformer_flags(capabilities),
    )
    spec = get_moe_module_spec(
        use_te=capabilities.transformer_engine.value,
        num_experts=4,
        moe_grouped_gemm=capabilities.grouped_gemm.value,
    )
    layer = spec(config, pg_collection=groups).to(device())
    output, _ = layer(torch.rand(4, 2, 16, device=device()))
    output.square().mean().backward()
    destroy()
    return sum(parameter.grad is not None for parameter in layer.parameters())


if __name__ == "__main__":
    sys.exit(main())
