"""What a sample costs, so that ranks can be given equal work before anything is read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.modalities import MODALITIES

UNITS_PER_TOKEN = 256
_MOST_UNITS = 2**28  # of one sample: sums and products of a step's then stay exact in 64 bits


def _units(cost: np.ndarray) -> np.ndarray:
    return np.minimum(np.rint(cost * UNITS_PER_TOKEN), _MOST_UNITS).astype(np.int64)


@dataclass(frozen=True)
class CostModel:
    """Seconds of work, forward and backward; only their ratios matter to dealing.

    A sequence of ``n`` tokens costs ``linear * n + quadratic * n**2`` in the language model
    (matrices of every layer, and attention inside the sequence), and each of its media what the
    frozen encoder needs.

    Attributes:
        linear: per token.
        quadratic: per token squared.
        encoder: by modality: per picture, per frame of a video, per second of sound; a modality
            that is not named costs nothing.
        source: where the numbers come from, for the log.
    """

    linear: float = 1.0
    quadratic: float = 0.0
    encoder: Mapping[str, float] = field(default_factory=dict)
    source: str = "tokens"

    def __post_init__(self) -> None:
        numbers = [self.linear, self.quadratic, *self.encoder.values()]
        if not all(np.isfinite(n) and n >= 0 for n in numbers) or not self.linear > 0:
            raise DataError(f"The costs from {self.source} are not positive, finite numbers.")

    def language(self, tokens: np.ndarray) -> np.ndarray:
        """Work in the language model of sequences of ``tokens`` tokens, ``[samples]`` int64.

        In units of 1/256 of a token's linear cost: integers, so that processes on different
        processors deal alike to the last sample.
        """
        length = tokens.astype(np.float64)
        return _units(length + self.quadratic / self.linear * length * length)

    def encoders(self, work: np.ndarray) -> np.ndarray:
        """Work in the encoders in the same units, from ``[samples, modalities]``; int64."""
        total = np.zeros(len(work), dtype=np.int64)
        for place, modality in enumerate(MODALITIES):
            each = self.encoder.get(modality, 0.0) / self.linear
            total += _units(work[:, place].astype(np.float64) * each)
        return np.minimum(total, _MOST_UNITS)

    def save(self, path: Path) -> None:
        """Write the numbers, visible only when whole."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")
        partial.replace(path)

    @classmethod
    def load(cls, path: Path) -> CostModel:
        """Read what ``save`` wrote.

        Raises:
            DataError: there is no such file, or it is damaged.
        """
        try:
            record = json.loads(path.read_text("utf-8"))
            encoder = {str(name): float(cost) for name, cost in record["encoder"].items()}
            return cls(
                float(record["linear"]),
                float(record["quadratic"]),
                encoder,
                str(record["source"]),
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"The costs {path} cannot be read ({error}): measure them again with "
                "python -m unimoe_mcore.calibrate."
            ) from error
