"""What every encoder is, and the registry that finds one by its name."""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import pkgutil
from collections.abc import Callable
from typing import Any, ClassVar, Self, TypeVar

import torch
from torch import Tensor, nn

from data_pipeline.reading.medium import Medium
from unimoe_mcore.config.errors import UserError
from unimoe_mcore.config.towers import EncoderConfig


class Encoder(nn.Module):
    """A network from media to features, frozen unless a recipe trains it.

    It stays in evaluation mode, also where it trains, and draws no random numbers. It runs on
    whatever device its weights are on. The features of a medium do not depend on which media are
    encoded with it.

    A subclass loads its weights, calls ``freeze``, and implements ``_encode`` and ``settings``.

    Attributes:
        name: name in the registry.
        modalities: modalities that it reads.
        version: raised whenever the code changes what comes out; part of the fingerprint.
        libraries: distributions, besides torch, that decode, prepare or compute; their versions
            are part of the fingerprint.
        feature_size: width of a feature.
        cells: features of one picture; 0 for encoders of sound, whose number varies.
        config: the configuration it was built from.
    """

    name: ClassVar[str]
    modalities: ClassVar[tuple[str, ...]]
    version: ClassVar[int]
    libraries: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: EncoderConfig, feature_size: int, cells: int = 0) -> None:
        super().__init__()
        self.config = config
        self.feature_size = feature_size
        self.cells = cells

    def freeze(self) -> None:
        """Stop all weights from training and enter evaluation mode for good."""
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode, also when the model around it trains."""
        return super().train(False)

    def settings(self) -> dict[str, Any]:
        """The preprocessing settings on which the features depend."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """SHA-256, hexadecimal, of everything that the features of a medium depend on.

        That is the name, the version of the code and of the libraries, the settings and every
        byte of the weights. Equal fingerprints give equal features, so it is the key under which
        features are cached.
        """
        settings = sorted(self.settings().items())
        libraries = [
            (library, importlib.metadata.version(library))
            for library in sorted({"torch", *self.libraries})
        ]
        digest = hashlib.sha256(repr((self.name, self.version, libraries, settings)).encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
            raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            digest.update(raw.numpy().tobytes())
        return digest.hexdigest()

    def forward(self, media: list[Medium]) -> list[Tensor]:
        """``encode`` with gradient, in the type and on the device of the weights."""
        for medium in media:
            if medium.modality not in self.modalities:
                raise UserError(
                    f"The encoder '{self.name}' reads {' and '.join(self.modalities)}, but "
                    f"{medium.source} is {medium.modality}; give that modality its own tower."
                )
        return self._encode(media)

    @torch.no_grad()
    def encode(self, media: list[Medium]) -> list[Tensor]:
        """Encode media of this encoder's modalities.

        Returns:
            One float16 tensor on the CPU for each medium: image ``[cells, feature_size]``,
            video ``[frames, cells, feature_size]``, speech and audio ``[features, feature_size]``
            with ``sound_features(duration_ms, config)`` features.

        Raises:
            UserError: a medium of a modality that this encoder does not read.
            BrokenMediumError: a medium that cannot be decoded.
        """
        largest = torch.finfo(torch.float16).max
        # Clamped: an infinity in the cache would poison every step that meets it.
        return [
            features.clamp(-largest, largest).to("cpu", torch.float16).contiguous()
            for features in self(media)
        ]

    def _encode(self, media: list[Medium]) -> list[Tensor]:
        """``forward`` of media that this encoder reads."""
        raise NotImplementedError

    def operations(self, features: Tensor) -> int:
        """Operations (``unimoe_mcore.model.operations``) that one medium's features took.

        0 where an encoder does not say: what it computes is then missing in a run's MFU.

        Args:
            features: as ``encode`` gives them.
        """
        return 0

    def _weight(self) -> Tensor:
        """Any weight: its device and type are those in which the encoder computes."""
        return next(self.parameters())


_ENCODERS: dict[str, type[Encoder]] = {}
_Class = TypeVar("_Class", bound=type[Encoder])


def register_encoder(name: str) -> Callable[[_Class], _Class]:
    """Class decorator: make an encoder known by ``name``.

    Files of the package ``unimoe_mcore.model.towers.encoders`` are found without being listed.
    """

    def register(encoder: _Class) -> _Class:
        encoder.name = name
        _ENCODERS[name] = encoder
        return encoder

    return register


def build_encoder(config: EncoderConfig) -> Encoder:
    """Build the frozen encoder that ``config`` names.

    The state of the random generators is left as it was: ranks that hold different encoders go
    on drawing the same numbers.

    Raises:
        UserError: the name is unknown, or the weights are missing or not the expected ones.
    """
    package = __name__.rpartition(".")[0]
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
        importlib.import_module(f"{package}.{module.name}")
    if config.name not in _ENCODERS:
        raise UserError(
            f"There is no encoder '{config.name}'; choose one of {', '.join(sorted(_ENCODERS))}."
        )
    with torch.random.fork_rng(devices=[]):
        encoder = _ENCODERS[config.name](config)  # type: ignore[call-arg]
    encoder.freeze()
    return encoder
