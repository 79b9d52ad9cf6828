import errno
import json
import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline.reading.decode import BrokenMediumError
from tests.media import clip, medium, picture, sound
from unimoe_mcore.config.errors import UserError
from unimoe_mcore.config.towers import EncoderConfig
from unimoe_mcore.model.towers import feature_cache
from unimoe_mcore.model.towers.encoders import Encoder, build_encoder
from unimoe_mcore.model.towers.feature_cache import FeatureCache

torch.set_num_threads(1)


class Counting:
    """A random encoder that remembers what it was asked for."""

    def __init__(self, name: str = "random_image", **options) -> None:
        self.encoder = build_encoder(EncoderConfig(name=name, frames=3, **options))
        self.asked: list[str] = []
        original = self.encoder.encode

        def encode(media):
            self.asked += [m.source for m in media]
            return original(media)

        self.encoder.encode = encode  # type: ignore[method-assign]


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(
        x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b, strict=True)
    )


def files(cache: FeatureCache) -> list[Path]:
    return sorted(cache.folder.glob("*/*"))


def test_only_misses_are_encoded_and_duplicates_once(tmp_path):
    counting = Counting()
    cache = FeatureCache(tmp_path, counting.encoder)
    a, b, video = picture(1, name="a"), picture(2, name="b"), clip()
    first = cache.features([a, b, a, video])
    assert counting.asked == ["test.tar:a", "test.tar:b", "test.tar:x"]
    assert [tuple(f.shape) for f in first] == [(4, 32), (4, 32), (4, 32), (3, 4, 32)]
    assert equal(first, Counting().encoder.encode([a, b, a, video]))

    counting.asked.clear()
    new = picture(3, name="new")
    again = FeatureCache(tmp_path, counting.encoder).features([video, new, b, a])
    assert counting.asked == ["test.tar:new"]
    assert equal([again[3], again[2], again[0]], [first[0], first[1], first[3]])
    assert cache.features([]) == []


def test_the_name_of_a_medium_does_not_matter_its_bytes_do(tmp_path):
    counting = Counting()
    cache = FeatureCache(tmp_path, counting.encoder)
    cache.features([picture(1, name="here")])
    cache.features([picture(1, name="there")])
    assert counting.asked == ["test.tar:here"]


def test_layout(tmp_path):
    counting = Counting("random_sound")
    cache = FeatureCache(tmp_path, counting.encoder)
    recording = sound(500)
    features = cache.features([recording])[0]
    fingerprint = counting.encoder.fingerprint()
    path = tmp_path / f"random_sound-{fingerprint[:16]}" / recording.digest[:2]
    path /= f"{recording.digest}.npy"
    assert files(cache) == [path]
    # Any reader of .npy files opens it.
    assert np.array_equal(np.load(path, allow_pickle=False), features.numpy())
    description = json.loads((cache.folder / "description.json").read_text())
    assert description["fingerprint"] == fingerprint
    assert description["settings"] == counting.encoder.settings()


def test_one_file_as_picture_and_as_video(tmp_path):
    # The features of the same bytes differ, and neither may stand for the other.
    counting = Counting()
    cache = FeatureCache(tmp_path, counting.encoder)
    counting.encoder.encode = lambda media: [  # type: ignore[method-assign]
        torch.zeros((3, 4, 32) if m.modality == "video" else (4, 32)).half() for m in media
    ]
    both = [medium(modality, b"the same", modality) for modality in ("video", "image")]
    assert [f.dim() for f in cache.features(both)] == [3, 2]
    assert [f.dim() for f in FeatureCache(tmp_path, counting.encoder).features(both)] == [3, 2]
    assert len(files(cache)) == 2


def test_another_encoder_has_another_folder(tmp_path):
    one = Counting()
    two = Counting(feature_size=16)
    picture_ = picture()
    assert FeatureCache(tmp_path, one.encoder).features([picture_])[0].shape == (4, 32)
    assert FeatureCache(tmp_path, two.encoder).features([picture_])[0].shape == (4, 16)
    with torch.no_grad():
        one.encoder.projection.mul_(0.5)
    one.asked.clear()
    FeatureCache(tmp_path, one.encoder).features([picture_])
    assert one.asked == ["test.tar:x"]


def test_missing(tmp_path):
    cache = FeatureCache(tmp_path, Counting().encoder)
    a, b = picture(1, name="a"), picture(2, name="b")
    assert cache.missing([a, b, a]) == [a, b]
    cache.features([a])
    assert cache.missing([a, b]) == [b]


def _flip(content: bytes) -> bytes:
    return content[:-20] + bytes([content[-20] ^ 1]) + content[-19:]


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:3],
        lambda content: content[:40],
        lambda content: content[:-1],
        lambda content: content[: len(content) // 2],
        _flip,
        lambda content: content + b"x",
        lambda content: b"\x80\x04K\x01." + content,
        lambda content: feature_cache._pack(np.zeros((4, 31), np.float16)),
        lambda content: feature_cache._pack(np.zeros((4, 32), np.float32)),
        lambda content: feature_cache._pack(np.zeros((3, 4, 32), np.float16)),
    ],
    ids=[
        "empty",
        "three bytes",
        "header cut",
        "last byte gone",
        "half",
        "one bit",
        "longer",
        "pickle",
        "width",
        "type",
        "rank",
    ],
)
def test_a_damaged_file_is_computed_again(tmp_path, damage):
    counting = Counting()
    cache = FeatureCache(tmp_path, counting.encoder)
    good = cache.features([picture()])
    [path] = files(cache)
    content = path.read_bytes()
    path.write_bytes(damage(content))
    assert equal(cache.features([picture()]), good)
    assert counting.asked == ["test.tar:x"] * 2
    assert path.read_bytes() == content


def test_work_before_a_broken_medium_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(feature_cache, "_CHUNK", 2)
    counting = Counting()
    cache = FeatureCache(tmp_path, counting.encoder)
    good = [picture(i, name=str(i)) for i in range(4)]
    bad = medium("image", b"nothing", "bad")
    with pytest.raises(BrokenMediumError) as caught:
        cache.features([*good[:2], bad, *good[2:]])
    assert caught.value.source == bad.source
    assert cache.missing(good) == good[2:]
    assert len(cache.features([m for m in good if m.source != caught.value.source])) == 4
    assert [path.name for path in files(cache) if path.name.startswith(".")] == []


def test_a_full_disk_says_so_and_leaves_no_draft(tmp_path, monkeypatch):
    cache = FeatureCache(tmp_path, Counting().encoder)

    def full(self, target):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(UserError, match="No space left"):
        cache.features([picture()])
    assert files(cache) == []


def test_description_of_another_encoder_is_refused(tmp_path):
    encoder = Counting().encoder
    cache = FeatureCache(tmp_path, encoder)
    path = cache.folder / "description.json"
    path.write_text("{half")  # damaged: written again
    FeatureCache(tmp_path, encoder)
    assert json.loads(path.read_text())["fingerprint"] == encoder.fingerprint()
    path.write_text('{"fingerprint": "0123"}')
    with pytest.raises(UserError, match="describes another encoder"):
        FeatureCache(tmp_path, encoder)


def _fill(root: Path, barrier, results, rank: int) -> None:
    cache = FeatureCache(root, build_encoder(EncoderConfig(name="random_image")))
    media = [picture(i) for i in range(12)]
    barrier.wait(timeout=30)
    for _ in range(5):
        features = cache.features(media)
        for path in files(cache):
            if rank == 0 and path.suffix == ".npy" and not path.name.startswith("."):
                path.unlink(missing_ok=True)
    results.put(torch.stack(features).sum(dtype=torch.float64).item())


def test_processes_share_a_folder(tmp_path):
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(2), context.Queue()
    processes = [
        context.Process(target=_fill, args=(tmp_path, barrier, results, rank)) for rank in (0, 1)
    ]
    for process in processes:
        process.start()
    sums = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    expected = build_encoder(EncoderConfig(name="random_image")).encode(
        [picture(i) for i in range(12)]
    )
    assert sums == [torch.stack(expected).sum(dtype=torch.float64).item()] * 2
    assert [path for path in tmp_path.rglob(".*") if path.is_file()] == []


def test_reading_a_batch_takes_milliseconds(tmp_path):
    class Wide(Encoder):
        name, modalities, version = "wide", ("image",), 1

        def settings(self):
            return {}

        def _encode(self, media):
            return [torch.randn(25, 1728) for _ in media]

    cache = FeatureCache(tmp_path, Wide(EncoderConfig(), 1728, 25))
    media = [picture(i) for i in range(24)]
    cache.features(media)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        cache.features(media)
        times.append(time.perf_counter() - start)
    # Measured 4 ms; ten times that on a busy machine is still far below one encoder batch.
    assert min(times) < 0.04
