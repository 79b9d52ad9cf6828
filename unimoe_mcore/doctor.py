"""``python -m unimoe_mcore.doctor [--json]``: what this machine has, what will be used, and why.

Ends with 0 if training can run here, and with 1 and one sentence if something that it needs is
missing.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import itertools
import json
import os
import platform
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MEGATRON = "0.19.2"
"""The only version that ``runtime.cpu`` fits."""

REQUIREMENTS = Path(__file__).resolve().parents[1] / "requirements.txt"

INSTALL = "pip install -r requirements.txt"

OPTIONAL = {
    "transformer-engine": ("kernels for a CUDA device", "see requirements-gpu.txt"),
    "wandb": ("for logging=wandb", "pip install wandb"),
    "tensorboard": ("for logging=tensorboard", "pip install tensorboard"),
}
"""What training can do without: what it is for, and how to get it."""

KERNELS = (
    ("cuda", "device"),
    ("transformer_engine", "layers"),
    ("attention", "attention"),
    ("norm", "norm"),
    ("grouped_gemm", "experts in one product"),
    ("dispatcher", "token dispatcher"),
    ("adam", "optimizer, AdamW of"),
    ("weight_gradient_fusion", "weight gradients fused"),
    ("compiled_fusions", "torch.compile fusions"),
    ("permute_fusion", "token sort fused"),
    ("rope_fusion", "rotary embedding fused"),
)
"""Every choice of ``runtime.capabilities``, and what a user calls it."""

NAMES = {"cuda": ("CPU", "CUDA"), "transformer_engine": ("Megatron", "Transformer Engine")}
"""What ``no`` and ``yes`` are called, if otherwise."""

WIDTH, SUBJECT, VALUE = 80, 27, 19
"""Characters of a line, and of its first two columns."""

PAIRED = 3
"""Findings without a reason in a row, beyond which two share a line."""


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        subject: what was looked at.
        value: what was found.
        reason: why it is so; may be empty.
        good: False if training cannot run this way.
        cure: how to get what is missing; empty if nothing is.
    """

    subject: str
    value: str
    reason: str = ""
    good: bool = True
    cure: str = ""


def main(arguments: Sequence[str] = ()) -> int:
    """Print the report; the exit status is 1 if training cannot run here."""
    if arguments and list(arguments) != ["--json"]:
        print(__doc__)
        return 0 if arguments[0] in ("-h", "--help") else 2
    as_json = bool(arguments)
    found: dict[str, list[Finding]] = {}
    for title, look in _sections():
        if title in ("Kernels", "Self-test") and _bad(found):
            break  # they would end in a traceback
        found[title] = look()
        if not as_json:
            print(_in_words(title, found[title]), flush=True)
    verdict = _verdict(found)
    if as_json:
        print(json.dumps(_plain(found, verdict), indent=1))
    else:
        if missing := _missing(found):
            print(_in_words("Missing, and how to get it", missing))
        print("\n" + textwrap.fill(verdict, WIDTH, break_on_hyphens=False))
    return 1 if _bad(found) else 0


def _sections() -> tuple[tuple[str, Callable[[], list[Finding]]], ...]:
    return (
        ("Machine", look_at_machine),
        ("Packages", look_at_packages),
        ("Kernels", look_at_kernels),
        ("Self-test", run_self_test),
    )


def _bad(found: dict[str, list[Finding]]) -> list[Finding]:
    return [finding for findings in found.values() for finding in findings if not finding.good]


def _missing(found: dict[str, list[Finding]]) -> list[Finding]:
    """What has a cure, with it."""
    return [
        Finding(finding.subject, "needed" if not finding.good else "optional", finding.cure)
        for findings in found.values()
        for finding in findings
        if finding.cure
    ]


def _verdict(found: dict[str, list[Finding]]) -> str:
    bad = _bad(found)
    if not bad:
        return "Training can run here."
    each = "; ".join(
        f"{finding.subject} {finding.value} ({finding.cure or finding.reason})" for finding in bad
    )
    return f"Training cannot run here: {each}."


def _plain(found: dict[str, list[Finding]], verdict: str) -> dict[str, Any]:
    """The report for a program; keys of sections are in lower case."""
    sections = {
        title.lower(): [dataclasses.asdict(finding) for finding in findings]
        for title, findings in found.items()
    }
    return {"ready": not _bad(found), "verdict": verdict, **sections}


def _in_words(title: str, findings: Sequence[Finding]) -> str:
    """A section in three columns and 80 characters; ``!`` marks what is not good.

    Many findings in a row that need no reason are set two to a line.
    """
    lines = [f"\n{title}"]
    for plain, group in itertools.groupby(findings, lambda each: each.good and not each.reason):
        members = list(group)
        if plain and len(members) > PAIRED:
            cells = [f"  {finding.subject} {finding.value}" for finding in members]
            half = -(-len(cells) // 2)
            for left, right in itertools.zip_longest(cells[:half], cells[half:], fillvalue=""):
                lines.append(f"{left:<{WIDTH // 2}}{right}".rstrip())
        else:
            lines += [line for finding in members for line in _row(finding)]
    return "\n".join(lines)


def _row(finding: Finding) -> list[str]:
    room = SUBJECT + VALUE
    mark = " " if finding.good else "!"
    columns = f"{mark} {finding.subject:<{SUBJECT - 2}}{finding.value:<{VALUE}}"
    wrapped = textwrap.wrap(finding.reason or finding.cure, WIDTH - room, break_on_hyphens=False)
    if len(columns) > room:  # what is too long has a line of its own
        columns = f"{mark} {finding.subject} {finding.value}"
        return [columns, *(" " * room + line for line in wrapped)]
    return [
        f"{start}{line}".rstrip()
        for start, line in zip(
            [columns, *[" " * room] * len(wrapped)], wrapped or [""], strict=False
        )
    ]


def look_at_machine() -> list[Finding]:
    """Python, cores and memory."""
    right = sys.version_info[:2] == (3, 12)
    findings = [
        Finding(
            "Python",
            platform.python_version(),
            "" if right else "Megatron-Core and this project are pinned to Python 3.12",
            right,
            "" if right else "install Python 3.12 and type make setup",
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
    """The version of every package of ``requirements.txt``, and of what is optional."""
    required = [_look_at_package(name, pinned) for name, pinned in _requirements()]
    return required + [_look_at_optional(name) for name in OPTIONAL]


def _requirements() -> Iterator[tuple[str, str]]:
    """Names and pinned versions of the direct dependencies."""
    for line in REQUIREMENTS.read_text(encoding="utf8").splitlines():
        name, _, version = line.partition("#")[0].partition("==")
        if name.strip():
            yield name.strip(), version.strip()


def _look_at_package(name: str, pinned: str) -> Finding:
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, "is missing", good=False, cure=INSTALL)
    if name == "megatron-core" and version != MEGATRON:
        cure = f"pip install megatron-core=={MEGATRON}"
        return Finding(name, version, f"only {MEGATRON} fits", good=False, cure=cure)
    return Finding(name, version, "" if version == pinned else f"tested with {pinned}")


def _look_at_optional(name: str) -> Finding:
    purpose, cure = OPTIONAL[name]
    try:
        return Finding(name, importlib.metadata.version(name), f"optional, {purpose}")
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, "not installed", f"optional, {purpose}", cure=cure)


def look_at_kernels() -> list[Finding]:
    """Every choice of ``runtime.capabilities`` and the number format, each with its reason."""
    from unimoe_mcore.runtime.capabilities import detect, probe_apex
    from unimoe_mcore.runtime.devices import backend
    from unimoe_mcore.runtime.precision import choose_precision

    chosen = detect()
    findings = []
    for field, subject in KERNELS:
        choice = getattr(chosen, field)
        no, yes = NAMES.get(field, ("no", "yes"))
        words = {True: yes, False: no}.get(choice.value, choice.value)
        findings.append(Finding(subject, words.replace("_", " "), choice.reason))
    apex = probe_apex()
    if "not NVIDIA's" in apex.reason:
        cure = "pip uninstall apex"
        findings.append(Finding("apex", "is the wrong package", apex.reason, False, cure))
    precision = choose_precision("auto")
    findings.append(Finding("number format", precision.value, precision.reason))
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
    sys.exit(main(sys.argv[1:]))
