"""Models without memory: built on the meta device first, given memory afterwards.

A stage fills every weight of its language model from a source or by name. Weights that Megatron
draws before that would be drawn twice, and a model is built in seconds whatever its size if it is
built without memory: layouts of any size can be inspected on any machine.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode


class WithoutMemory(TorchFunctionMode):
    """While it is entered, ``torch.empty`` allocates on the meta device whatever it is told.

    All of Megatron's and PyTorch's layers allocate their weights by ``torch.empty`` and fill them
    afterwards, which is nothing on the meta device. Transformer Engine's give a weight without
    memory some by ``torch.empty_like`` before they fill it and mark it (``reset_parameters`` in
    ``module/base.py``): the same goes for that. Values that are computed (the frequencies of the
    rotary positions, counters of a router) come from other functions and stay real.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call ``func``, with another device if it is one of the two."""
        keywords = dict(kwargs or {})
        # By name: on a machine without CUDA the function in ``torch`` is a wrapper of this one.
        if getattr(func, "__name__", "") in ("empty", "empty_like"):
            keywords["device"] = torch.device("meta")
        return func(*args, **keywords)


def materialise(module: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Give every parameter without memory its memory, uninitialised, in place.

    Tied parameters stay tied, and Megatron's marks on a parameter (``allreduce``,
    ``sequence_parallel``, ``partition_dim`` ...) stay on it; ``Module.to_empty`` loses them.

    Args:
        device: where to.
        dtype: of floating-point parameters.

    Raises:
        RuntimeError: a buffer has no memory: nothing would ever fill it.
    """
    made: dict[nn.Parameter, nn.Parameter] = {}
    for path, owner in module.named_modules():
        for name, buffer in owner.named_buffers(recurse=False):
            if buffer.is_meta:
                raise RuntimeError(f"the buffer {path}.{name} was built without memory")
        for name, parameter in owner.named_parameters(recurse=False, remove_duplicate=False):
            if not parameter.is_meta:
                continue
            if parameter not in made:
                empty = torch.empty_like(parameter, device=device, dtype=dtype)
                made[parameter] = nn.Parameter(empty, parameter.requires_grad)
                made[parameter].__dict__.update(parameter.__dict__)
            setattr(owner, name, made[parameter])
