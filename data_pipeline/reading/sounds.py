"""Samples of a recording: mono, at the rate wanted, no longer than wanted."""

from __future__ import annotations

import math

import numpy as np
import soxr

from data_pipeline.reading.limits import LIMITS, BrokenMediumError, DecodeLimits, blame
from data_pipeline.reading.medium import Medium
from data_pipeline.reading.recording import SoundFacts, open_recording


def probe_sound(medium: Medium, limits: DecodeLimits = LIMITS) -> SoundFacts:
    """Read the length of a recording from its header, without decoding it.

    Raises:
        BrokenMediumError: not a recording, empty, or outside ``limits``.
    """
    with (
        blame(medium, "recording", limits.max_bytes),
        open_recording(medium, limits) as recording,
    ):
        return recording.facts


def decode_sound(
    medium: Medium, max_seconds: float, rate: int = 16_000, limits: DecodeLimits = LIMITS
) -> np.ndarray:
    """Decode the first ``max_seconds`` of a recording; nothing behind them is decompressed.

    Channels are averaged. Another sampling rate is converted by libsoxr (band-limited, its
    high-quality preset).

    Args:
        medium: a file that libsndfile reads (WAV, FLAC, OGG, MP3, AIFF, ...), or the first
            recording in one that FFmpeg reads (MP4/M4A, Matroska/WebM, OGG, AAC, WAV, ASF).
        max_seconds: longest stretch returned, seconds.
        rate: sampling rate wanted, Hz.
        limits: bounds on bytes, length, rate, channels and amplitude.

    Returns:
        float32 ``[samples]``, full scale 1.

    Raises:
        BrokenMediumError: not a recording, truncated, empty, outside ``limits``, or not finite.
    """
    with (
        blame(medium, "recording", limits.max_bytes),
        open_recording(medium, limits) as recording,
    ):
        facts = recording.facts
        wanted = min(facts.samples, math.ceil(max_seconds * facts.rate))
        # One block at a time, so that many channels never lie in memory at full length.
        mono = [_mean(block) for block in recording.blocks(wanted)]
        samples = np.concatenate(mono) if mono else np.zeros(0, np.float32)
        missing = wanted - len(samples)
        if missing > min(recording.slack, wanted - 1):
            raise BrokenMediumError(
                medium.source, f"the recording is truncated: {len(samples)} of {wanted} samples"
            )
        if missing:
            samples = np.pad(samples, (0, missing))
        # NaN compares false, so this refuses it as well.
        if not max(-samples.min(), samples.max()) <= limits.max_amplitude:
            raise BrokenMediumError(medium.source, "the recording holds samples that are not sound")
        if facts.rate != rate:
            samples = soxr.resample(samples, facts.rate, rate, quality="HQ")
        return np.ascontiguousarray(samples[: math.ceil(max_seconds * rate)], dtype=np.float32)


def _mean(block: np.ndarray) -> np.ndarray:
    """The average over channels; column by column, since numpy is slow along such short rows."""
    total = block[:, 0].copy()
    for channel in range(1, block.shape[1]):
        total += block[:, channel]
    total /= block.shape[1]
    return total
