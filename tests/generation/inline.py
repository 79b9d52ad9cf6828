"""Decoding in this process, for tests that decode much; ``test_apart`` shows it is the same."""

from __future__ import annotations

from collections.abc import Sequence

from data_pipeline.reading.apart import Decoded
from data_pipeline.reading.decode import probe_sound
from data_pipeline.reading.limits import DecodeLimits
from data_pipeline.reading.medium import Medium
from data_pipeline.reading.prepare import prepare
from unimoe_mcore.config.towers import EncoderConfig


def decode_here(
    media: Sequence[tuple[Medium, EncoderConfig]], limits: DecodeLimits, seconds: float
) -> list[Decoded]:
    found = []
    for medium, encoder in media:
        sound = medium.modality in ("speech", "audio")
        length = probe_sound(medium, limits).duration_ms if sound else 0
        found.append(Decoded(prepare(medium, encoder, limits), length, moves=False))
    return found
