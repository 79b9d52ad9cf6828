"""Canonical names: what a parameter is called, whichever modules it lives in.

They are the names that Megatron's local modules give. Transformer Engine's modules differ in three
ways: a norm that is fused into the linear layer behind it is that layer's ``layer_norm_weight``;
the experts of a rank in one grouped matrix product are ``weight0``, ``weight1`` ... of one module;
and every module has an ``_extra_state`` for 8-bit formats, which is no parameter and never stored.

On disk Megatron's ``sharded_state_dict`` makes the names equal: of norms by ``FUSED_NORMS`` (handed
to it in the layer specs), of grouped experts by itself (``TEGroupedMLP.sharded_state_dict`` of
megatron-core 0.19.2 stacks them under the names of ``SequentialMLP``).
"""

from __future__ import annotations

import re

FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}
"""Beginnings of names within a layer, Transformer Engine's -> canonical; Megatron's form
(``TransformerLayerSubmodules.sharded_state_dict_keys_map``)."""

_NORM = re.compile("|".join(map(re.escape, FUSED_NORMS)))
_GROUPED = re.compile(r"\.mlp\.experts\.(linear_fc[12])\.weight(\d+)$")


def canonical(parameter: str) -> str:
    """The name that local modules give to the parameter of this name in the model.

    Args:
        parameter: its name in a model of local or of Transformer Engine's modules; an expert's
            number counts the experts of this rank.
    """
    unfused = _NORM.sub(lambda found: FUSED_NORMS[found[0]], parameter)
    return _GROUPED.sub(r".mlp.experts.local_experts.\2.\1.weight", unfused)
