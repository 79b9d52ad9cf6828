from . import distributed, fp8
from .attention import DotProductAttention
from .linear import GroupedLinear, LayerNormLinear, Linear
from .norm import LayerNorm, RMSNorm

__all__ = [
    "DotProductAttention",
    "GroupedLinear",
    "LayerNorm",
    "LayerNormLinear",
    "Linear",
    "RMSNorm",
    "distributed",
    "fp8",
]
