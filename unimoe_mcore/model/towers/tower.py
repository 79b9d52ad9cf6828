"""A tower: an encoder and the connector that leads into the language model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.models.mimo.submodules.base import ModalitySubmodules
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from data_pipeline.modalities import tower_modalities
from data_pipeline.reading.medium import Medium
from unimoe_mcore.config.towers import TowerConfig
from unimoe_mcore.model.connectors import build_connector
from unimoe_mcore.model.connectors.frame_tokens import FrameReducer
from unimoe_mcore.model.operations import Operations
from unimoe_mcore.model.towers.feature_cache import FeatureCache
from unimoe_mcore.model.towers.live_encoder import LiveEncoder

_ENCODER = "encoders.encoder."  # of a trained encoder's parameters in the tower


class Tower(ModalitySubmodules):
    """Media of one kind in, language-model embeddings out.

    A frozen encoder is held by the feature cache, outside the module tree, so it is neither cast,
    nor wrapped for gradient reduction, nor saved. One that trains is a submodule like any other.

    What trains takes part in every forward pass, with an empty batch where a rank has no
    medium of this kind: all ranks then have the same gradients to reduce.
    """

    def __init__(
        self,
        name: str,
        config: TowerConfig,
        features: FeatureCache | LiveEncoder,
        hidden: int,
        groups: Any,
    ) -> None:
        encoder = features.encoder
        tokens = encoder.cells or None  # of one medium, where all have as many
        connector = build_connector(config.connector, encoder.feature_size, hidden, tokens)
        trained = {"encoder": encoder} if isinstance(features, LiveEncoder) else {}
        super().__init__(encoders=trained, input_projections=[connector])
        self.name = name
        self.features = features
        self.frame_order = config.frame_order
        self.groups = groups
        self.modalities = tower_modalities(name)
        self.connected = Operations()  # by the connector so far
        self.frame_reducer: FrameReducer | None = None
        if "video" in self.modalities and config.frame_order == "ordered":
            self.frame_reducer = FrameReducer(
                encoder.feature_size,
                encoder.cells,
                config.frame_channels,
                hidden,
                config.encoder.frames,
            )

    def forward(self, media: dict[str, list[Medium]]) -> dict[str, Tensor]:
        """Embed every medium of this tower's modalities.

        Args:
            media: media by modality, in the order in which their markers appear.

        Returns:
            For every modality ``[tokens, hidden]``, media after one another.
        """
        if "image" in self.modalities:
            return self._pictures(media["image"], media["video"])
        return {m: self.connect(self.features.features(media[m])) for m in self.modalities}

    def connect(self, features: Sequence[Tensor]) -> Tensor:
        """Features of several media, each ``[features, size]``, as ``[tokens, hidden]``."""
        lengths = [len(f) for f in features]
        self.connected += self.input_projections[0].operations(lengths)
        weight = next(self.input_projections.parameters())
        joined = torch.cat([self._nothing(weight), *(f.to(weight) for f in features)])
        return self.input_projections[0](joined, lengths)

    def _nothing(self, weight: Tensor) -> Tensor:
        """Features of no medium, ``[0, size]``."""
        if isinstance(self.features, LiveEncoder):
            return self.features.nothing().to(weight)
        return weight.new_zeros((0, self.features.encoder.feature_size))

    def _pictures(self, images: list[Medium], videos: list[Medium]) -> dict[str, Tensor]:
        pictures = self.features.features(images)
        clips = self.features.features(videos)
        if self.frame_reducer is not None:
            self.connected += self.frame_reducer.operations(len(clips))
            weight = next(self.frame_reducer.parameters())
            encoder = self.features.encoder
            shape = (0, self.frame_reducer.frames, encoder.cells, encoder.feature_size)
            stacked = torch.cat([weight.new_zeros(shape), *(c.to(weight)[None] for c in clips)])
            return {"image": self.connect(pictures), "video": self.frame_reducer(stacked)}
        # The paper: all frames go through encoder and projector with the pictures, then the mean.
        frames = [frame for clip in clips for frame in clip]
        joined = self.connect([*pictures, *frames])
        each = joined.shape[0] // max(1, len(pictures) + len(frames))
        split = each * len(pictures)
        averaged = (
            joined[split:].view(len(clips), -1, each, joined.shape[1]).mean(1)
            if clips
            else joined[split:]
        )
        return {"image": joined[:split], "video": averaged.reshape(-1, joined.shape[1])}

    def operations(self) -> int:
        """Needed operations of encoder and connector so far; steps are differences."""
        return self.features.operations + self.connected.total

    def decode(self, embeddings: Tensor, data_batch: dict[str, Any]) -> Tensor:
        """Towers only read: there is nothing to decode into."""
        raise RuntimeError(f"The {self.name} tower has no decoder.")

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """The weights in the module tree, replicated over tensor and data parallel ranks.

        On disk they are called ``connector.<tower>...`` and ``encoder.<tower>...``. Upstream's
        form hands no tensor-parallel group on, so that every such rank would claim to be the one
        that writes.
        """
        state = make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {},
            sharded_offsets,
            tp_group=self.groups.tp,
            dp_cp_group=self.groups.dp_cp,
        )
        for name, sharded in state.items():
            tail = name.removeprefix(prefix)
            if tail.startswith(_ENCODER):
                sharded.key = f"encoder.{self.name}.{tail.removeprefix(_ENCODER)}"
            else:
                tail = tail.replace("input_projections.0.", "")
                sharded.key = f"connector.{self.name}.{tail}"
        return state

    def passed_on(self) -> list[ShardedTensor]:
        """A frozen encoder's weights where a run before has trained them; else nothing.

        They belong to the connector: whoever takes that needs them too.
        """
        if isinstance(self.features, LiveEncoder) or not self.features.given:
            return []
        state = make_sharded_tensors_for_checkpoint(
            self.features.ready().state_dict(),
            f"encoder.{self.name}.",
            {},
            tp_group=self.groups.tp,
            dp_cp_group=self.groups.dp_cp,
        )
        return list(state.values())
