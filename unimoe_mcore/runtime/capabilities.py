"""The one place where kernels are chosen, each choice with its reason.

``look()`` finds out what is installed, ``choose()`` decides (a pure function, so that any machine
can be imagined in a test), ``transformer_flags()`` says it in Megatron's words. Line numbers are
those of megatron-core 0.19.2.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version


@dataclass(frozen=True)
class Choice[T]:
    """A decision and why it was made.

    Attributes:
        value: what was chosen.
        reason: half a sentence for a user.
    """

    value: T
    reason: str


@dataclass(frozen=True)
class Machine:
    """What is installed here, before anything is decided. Every value says "is there and works".

    Attributes:
        cuda: a CUDA device.
        transformer_engine: NVIDIA's Transformer Engine.
        apex: NVIDIA's Apex with its CUDA extensions (not PyPI's package of that name).
        wgrad: ``fused_weight_gradient_mlp_cuda``, an extension of Apex.
    """

    cuda: Choice[bool]
    transformer_engine: Choice[bool]
    apex: Choice[bool]
    wgrad: Choice[bool]


@dataclass(frozen=True)
class Capabilities:
    """Which kernels are used.

    Attributes:
        cuda: whether there is a CUDA device.
        transformer_engine: whether layers are built of Transformer Engine's modules
            (``unimoe_mcore.model.layers``).
        adam: ``transformer_engine``, ``apex`` or ``torch`` (``runtime.adam``).
        attention: ``transformer_engine`` (in 16 bit; ``packed`` in fp32) or ``packed``, the
            project's own.
        norm: ``transformer_engine`` or ``torch``.
        grouped_gemm: the experts of a rank in one grouped matrix product, unless they have
            adapters.
        dispatcher: ``alltoall``, how tokens travel to their experts.
        permute_fusion: tokens sorted by expert in one kernel.
        rope_fusion: rotary embedding in one kernel.
        weight_gradient_fusion: weight gradients added to the buffer inside the matrix product.
        compiled_fusions: the element-wise fusions that Megatron leaves to ``torch.compile``.
    """

    cuda: Choice[bool]
    transformer_engine: Choice[bool]
    adam: Choice[str]
    attention: Choice[str]
    norm: Choice[str]
    grouped_gemm: Choice[bool]
    dispatcher: Choice[str]
    permute_fusion: Choice[bool]
    rope_fusion: Choice[bool]
    weight_gradient_fusion: Choice[bool]
    compiled_fusions: Choice[bool]


MINIMUM_TE = Version("2.1")
"""Oldest Transformer Engine whose ``FusedAdam`` is trusted."""


@cache
def detect() -> Capabilities:
    """Look at this machine and choose; the answer does not change while the process lives."""
    return choose(look())


def look() -> Machine:
    """Find out what is installed. Imports no kernel package where there is no CUDA device."""
    cuda = probe_cuda()
    return Machine(
        cuda=cuda,
        transformer_engine=probe_transformer_engine(cuda.value),
        apex=probe_apex(),
        wgrad=_probe_module("fused_weight_gradient_mlp_cuda"),
    )


def probe_cuda() -> Choice[bool]:
    """Whether torch sees a CUDA device, and how many of which kind."""
    if not torch.cuda.is_available():
        built = torch.version.cuda
        why = "torch was built without CUDA" if built is None else "no CUDA device or driver"
        return Choice(False, f"{why}: CPU and gloo")
    return Choice(True, f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}")


def probe_transformer_engine(cuda: bool) -> Choice[bool]:
    """Whether Transformer Engine is there, recent enough, and can be imported.

    It is imported only where there is a CUDA device: elsewhere it is of no use.
    """
    try:
        version = importlib.metadata.version("transformer-engine")
    except importlib.metadata.PackageNotFoundError:
        return Choice(False, "not installed")
    if Version(version) < MINIMUM_TE:
        return Choice(False, f"{version} is installed, {MINIMUM_TE} or newer is needed")
    if cuda:
        try:
            importlib.import_module("transformer_engine.pytorch")
        except (ImportError, OSError) as error:  # OSError: a library that it links to is missing
            return Choice(False, f"{version} is installed but cannot be imported: {error}")
    return Choice(True, version)


def probe_apex() -> Choice[bool]:
    """Whether the installed ``apex`` is NVIDIA's, built with its CUDA extensions.

    PyPI's ``apex`` is a web toolkit of 2013; ``import apex`` alone, which is how Megatron asks in
    some places (``models/backends.py:27``), takes it for NVIDIA's.
    """
    found = importlib.util.find_spec("apex")
    if found is None:
        return Choice(False, "not installed")
    folders = [Path(folder) for folder in found.submodule_search_locations or ()]
    needed = ("multi_tensor_apply", "optimizers")
    if not all(any((folder / name).is_dir() for folder in folders) for name in needed):
        return Choice(
            False, "the package named apex is not NVIDIA's; remove it: pip uninstall apex"
        )
    if importlib.util.find_spec("amp_C") is None:
        return Choice(False, "NVIDIA Apex was installed without its CUDA extensions (amp_C)")
    return Choice(True, "NVIDIA Apex with amp_C")


def choose(machine: Machine) -> Capabilities:
    """Decide on every kernel from what is installed.

    Layers are built of Transformer Engine's modules where it and a CUDA device are there, and of
    Megatron's local modules elsewhere.
    """
    layers = _choose_layers(machine)
    # Their results were never compared with those of Megatron's plain forms.
    plain = Choice(False, "Megatron's plain form; Transformer Engine's was never compared with it")
    return Capabilities(
        cuda=machine.cuda,
        transformer_engine=layers,
        adam=_choose_adam(machine),
        attention=_choose_attention(layers.value),
        norm=Choice(
            "transformer_engine",
            "RMSNorm of Transformer Engine, in one module with the linear layer after it, unless "
            "that has an adapter",
        )
        if layers.value
        else Choice("torch", "torch's RMSNorm, with local layers"),
        grouped_gemm=Choice(
            layers.value,
            "GroupedLinear of Transformer Engine; experts with adapters run one after another"
            if layers.value
            else f"experts run one after another: {layers.reason}",
        ),
        dispatcher=Choice("alltoall", "Megatron's own, on any device"),
        permute_fusion=plain,
        rope_fusion=plain,
        weight_gradient_fusion=_choose_weight_gradients(machine, layers.value),
        compiled_fusions=Choice(
            machine.cuda.value,
            "torch.compile for the GPU"
            if machine.cuda.value
            else "compiling takes longer than it saves on the CPU",
        ),
    )


def transformer_flags(capabilities: Capabilities) -> dict[str, Any]:
    """The fields of Megatron's ``TransformerConfig`` that say whose modules and which kernels."""
    compiled, layers = capabilities.compiled_fusions.value, capabilities.transformer_engine.value
    return {
        "transformer_impl": "transformer_engine" if layers else "local",
        # On the CPU too: Megatron's own CPU initialisation gives every expert-parallel rank the
        # same expert weights.
        "use_cpu_initialization": False,
        "gradient_accumulation_fusion": capabilities.weight_gradient_fusion.value,
        # Kernels of Megatron's own attention and of Apex's norm, neither of which is used here.
        "masked_softmax_fusion": False,
        "persist_layer_norm": False,
        "bias_activation_fusion": compiled,
        "bias_dropout_fusion": compiled,
        "cross_entropy_loss_fusion": compiled,
        "apply_rope_fusion": capabilities.rope_fusion.value,
        "moe_permute_fusion": capabilities.permute_fusion.value,
        "moe_grouped_gemm": capabilities.grouped_gemm.value,
        "moe_token_dispatcher_type": capabilities.dispatcher.value,
        # No CUDA graphs; the default, "full", is deprecated and warns on every construction.
        "cuda_graph_modules": [],
    }


def _choose_layers(machine: Machine) -> Choice[bool]:
    te, ours = machine.transformer_engine, "layers are built of Megatron's own modules"
    if te.value and machine.cuda.value:
        return Choice(True, f"layers are built of the modules of Transformer Engine {te.reason}")
    why = f"{te.reason} is installed, but needs CUDA" if te.value else te.reason
    return Choice(False, f"{ours}; Transformer Engine: {why}")


def _choose_attention(layers: bool) -> Choice[str]:
    ours = "our own packed attention (unimoe_mcore/model/attention.py)"
    if layers:
        return Choice(
            "transformer_engine", f"DotProductAttention on packed rows (thd); in fp32 {ours}"
        )
    return Choice("packed", ours)


def _choose_adam(machine: Machine) -> Choice[str]:
    """Transformer Engine's before Apex's, as Megatron does (``optimizer/__init__.py:13``)."""
    if machine.cuda.value and machine.transformer_engine.value:
        return Choice("transformer_engine", "FusedAdam of Transformer Engine")
    if machine.cuda.value and machine.apex.value:
        return Choice("apex", "FusedAdam of NVIDIA Apex")
    if machine.transformer_engine.value or machine.apex.value:
        return Choice("torch", "torch's fused kernel; the installed ones need CUDA")
    return Choice("torch", "torch's fused kernel; neither Transformer Engine nor NVIDIA Apex here")


def _choose_weight_gradients(machine: Machine, layers: bool) -> Choice[bool]:
    """Always: Transformer Engine's modules do it themselves, Megatron's by Apex or by torch.

    The output layer is Megatron's in both cases.
    """
    if machine.cuda.value and machine.wgrad.value:
        local = f"NVIDIA Apex, {machine.wgrad.reason}"
    else:
        why = "Apex's kernel needs CUDA" if machine.wgrad.value else machine.wgrad.reason
        local = f"torch's own matrix product, {why}"
    if layers:
        return Choice(True, f"Transformer Engine's modules do it; the output layer: {local}")
    return Choice(True, local)


def _probe_module(name: str) -> Choice[bool]:
    found = importlib.util.find_spec(name) is not None
    return Choice(found, f"{name} is installed" if found else f"{name} is not installed")
