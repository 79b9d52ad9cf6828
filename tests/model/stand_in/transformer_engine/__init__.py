"""A stand-in for NVIDIA's Transformer Engine, in plain PyTorch, for tests without a GPU.

It has what Megatron-Core 0.19.2 imports of Transformer Engine and what our layers are built of:
modules with the constructor arguments, parameter names, marks on parameters and ways of allocating
of version 2.20 (``transformer_engine/pytorch/module``), and forward passes for one process. It is
no copy of its code and says nothing about its kernels. What it does not have cannot be imported,
which Megatron takes for an older version.

Only a process that puts the folder above on its path sees it.
"""

from . import common, pytorch

__version__ = "2.20.2"
__all__ = ["common", "pytorch"]
