"""Small media made on the fly: pictures, recordings and clips as bytes in a shard."""

import io

import av
import numpy as np
import soundfile
from PIL import Image

from data_pipeline.reading.medium import Medium


def medium(modality: str, data: bytes, name: str = "x") -> Medium:
    return Medium(modality, data, f"test.tar:{name}")


def picture(
    seed: int = 0, size: tuple[int, int] = (48, 40), form: str = "PNG", name: str = "x"
) -> Medium:
    """A smooth random picture of ``size`` (width, height) pixels."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(file, form)
    return medium("image", file.getvalue(), name)


def sound(
    samples: int | np.ndarray = 16_000,
    rate: int = 16_000,
    seed: int = 0,
    form: str = "WAV",
    subtype: str | None = None,
    modality: str = "speech",
) -> Medium:
    """A recording of noise of that many samples, or of the samples given."""
    if isinstance(samples, int):
        samples = np.random.default_rng(seed).normal(0, 0.1, samples).astype(np.float32)
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=form, subtype=subtype)
    return medium(modality, file.getvalue())


def clip(
    frames: int = 16,
    size: tuple[int, int] = (64, 48),
    form: str = "mp4",
    codec: str = "libx264",
    options: dict[str, str] | None = None,
) -> Medium:
    """A clip whose frame ``i`` is evenly grey of brightness ``4 i`` modulo 256."""
    file = io.BytesIO()
    with av.open(file, "w", format=form, options=options or {}) as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for index in range(frames):
            grey = np.full((size[1], size[0], 3), 4 * index % 256, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
        container.mux(stream.encode())
    return medium("video", file.getvalue())
