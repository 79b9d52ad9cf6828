"""Operations of connectors and real encoders against PyTorch's counter."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from data_pipeline.reading.medium import Medium
from data_pipeline.reading.prepare import SAMPLES_PER_FEATURE, picture_side
from unimoe_mcore.config.model import LanguageConfig, LoRAConfig, ModelConfig, MoEConfig
from unimoe_mcore.config.towers import ConnectorConfig, EncoderConfig
from unimoe_mcore.model.connectors import build_connector
from unimoe_mcore.model.operations import language_operations, needed_rows
from unimoe_mcore.model.towers.encoders import build_encoder


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize(
    "connector", [{"name": "mlp2x_gelu", "stack": 4}, {"name": "learned_query", "layers": 2}]
)
def test_a_connector_counts_what_it_computes(
    connector: dict[str, object], trained: bool, norm: bool
) -> None:
    config = ConnectorConfig(**connector, input_norm=norm)  # type: ignore[arg-type]
    built = build_connector(config, 24, 40, None).requires_grad_(trained)
    lengths = [12, 12, 12]
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        output = built(torch.randn(36, 24), lengths)
        if trained:
            output.sum().backward()
    assert built.operations(lengths).total == counter.get_total_flops() > 0


@pytest.mark.parametrize("name", ["efficientnet_lite0", "whisper_tiny_en", "random_image"])
def test_an_encoder_counts_what_it_computes(name: str) -> None:
    encoder = build_encoder(EncoderConfig(name, resolution=96, silence_seconds=0.0))
    rng = np.random.Generator(np.random.PCG64(0))
    if "image" in encoder.modalities:
        side = picture_side(encoder.config)
        pictures = rng.integers(0, 256, (8, side, side, 3), dtype=np.uint8)
        # As many as are encoded at a time: fewer are filled up with empty ones.
        media = [Medium("image", b"", "test", content=each) for each in pictures]
    else:
        wave = rng.normal(0, 0.1, 100 * SAMPLES_PER_FEATURE).astype(np.float32)
        media = [Medium("speech", b"", "test", content=wave)]
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        encoded = encoder.encode(media)
    # Before Whisper's network comes its spectrum: 80 filters over 201 frequencies, two frames a
    # feature.
    spectrum = 2 * 201 * 80 * 200 if name == "whisper_tiny_en" else 0
    assert sum(map(encoder.operations, encoded)) == counter.get_total_flops() - spectrum > 0


def test_needed_is_what_the_result_depends_on() -> None:
    rows = needed_rows([3, 5], labels=2)
    assert (rows.tokens, rows.pairs, rows.places) == (8, 6 + 15, 2)
    model = ModelConfig(
        LanguageConfig(blocks=4, hidden=8, ffn=16), MoEConfig(placement="second_half", top_k=2)
    )
    frozen = language_operations(model, 4, [], LoRAConfig(), rows)
    assert frozen.backward == 0
    # Only the router of the blocks from the third on trains: nothing flows below the third.
    router = language_operations(model, 4, ["router"], LoRAConfig(), rows)
    assert router.forward == frozen.forward
    all_of_it = language_operations(model, 4, ["embeddings", "router"], LoRAConfig(), rows)
    assert 0 < router.backward < all_of_it.backward / 2
