"""Frozen encoders, by name. One file each; a new file registers itself and is found."""

from unimoe_mcore.model.towers.encoders.base import Encoder, build_encoder, register_encoder

__all__ = ["Encoder", "build_encoder", "register_encoder"]
