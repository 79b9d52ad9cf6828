from contextlib import nullcontext


class CudaRNGStatesTracker:
    """Named as a base class by Megatron; its own tracker is used."""


def activation_recompute_forward(
    activation_recompute: bool = False, recompute_phase: bool = False
) -> nullcontext[None]:
    """Matters to 8-bit formats only."""
    return nullcontext()
