"""How media become language-model tokens and encoder work, given a model's towers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from data_pipeline.modalities import MODALITIES, modality, tower_modalities
from unimoe_mcore.config.errors import UserError
from unimoe_mcore.config.towers import TowerConfig


def medium_tokens(tower: TowerConfig, name: str, duration_ms: int) -> int:
    """Language-model tokens that one medium becomes, from facts alone: nothing is decoded.

    Args:
        tower: the tower that the medium enters.
        name: its modality.
        duration_ms: its length, milliseconds; of no meaning for what does not last.

    Raises:
        UserError: the modality is unknown, or the tower's encoder does not read it.
    """
    if name not in MODALITIES:
        known = f"{', '.join(MODALITIES[:-1])} or {MODALITIES[-1]}"
        raise UserError(f"The modality '{name}' enters no tower; use {known}.")
    return modality(name).tokens(tower, duration_ms)


@dataclass(frozen=True)
class TowerRule:
    """What media of every modality become.

    Attributes:
        towers: tower name -> its configuration.
    """

    towers: Mapping[str, TowerConfig]

    @property
    def name(self) -> str:
        """Equal for equal rules: what their results are cached under."""
        facts = {name: asdict(tower) for name, tower in self.towers.items()}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]

    def tower(self, name: str) -> TowerConfig:
        """The tower that takes a modality.

        Raises:
            UserError: there is none.
        """
        for tower, config in self.towers.items():
            if name in tower_modalities(tower):
                return config
        raise UserError(f"No tower of model.towers takes {name}.")

    def tokens(self, name: str, duration_ms: int) -> int:
        """Language-model tokens of a medium."""
        return medium_tokens(self.tower(name), name, duration_ms)

    def work(self, name: str, duration_ms: int) -> float:
        """What its encoder computes, in its modality's unit."""
        return modality(name).work(self.tower(name).encoder, duration_ms)
