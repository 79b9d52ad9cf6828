"""Keeps Megatron's harmless remarks off the terminal; everything else still gets through."""

from __future__ import annotations

import logging
import warnings

IMPORT_WARNINGS = (
    r"Transformer Engine and Apex are not installed\. Falling back to",
    r"Apex is not installed\. Falling back to Torch Norm",
    r"absl\.logging is not installed\.",
    r"MimoModelConfig is experimental",
    r"MimoModel is experimental",
    r"ModalitySubmodules is experimental",
)
"""What Megatron-Core 0.19.2 warns about as it is imported. The choices behind the first two are
``runtime.capabilities``'s, and ``python -m unimoe_mcore.doctor`` shows them with their reasons."""

FUTURE_WARNINGS = (
    r"`torch\.distributed\.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated",
)
"""Newer names of collectives that Megatron-Core 0.19.2 does not use yet."""

LOG_LINES: dict[str, str | tuple[str, ...]] = {
    # On a machine with a CUDA toolkit and no device.
    "torch.utils.cpp_extension": "No CUDA runtime is found",
    # On every construction of a HybridModel with plain MLP layers.
    "megatron.core.transformer.transformer_layer": "Rewrapping ModuleSpec",
    "megatron.core.rerun_state_machine": ("Implicit init", "RerunStateMachine initialized"),
}
"""Logger -> beginning of the harmless lines that it writes."""


def silence_import_remarks() -> None:
    """Filter exactly what is listed here; call it before Megatron is imported."""
    for message in IMPORT_WARNINGS:
        warnings.filterwarnings("ignore", message=message, category=UserWarning)
    for message in FUTURE_WARNINGS:
        warnings.filterwarnings("ignore", message=message, category=FutureWarning)
    for logger in LOG_LINES:
        logging.getLogger(logger).addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(LOG_LINES[record.name])
