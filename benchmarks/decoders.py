"""Who decodes fastest, by type: what ``data_pipeline.reading.decode`` chose, beside the others.

Pictures are to become uint8 RGB, recordings mono float32 at 16 kHz, clips eight frames; one
thread each. Libraries that only this comparison needs are left out where they are missing:

    pip install --no-deps opencv-python-headless torchvision miniaudio
"""

from __future__ import annotations

import importlib.util
import io
import statistics
import tempfile
from collections.abc import Callable
from importlib.metadata import distributions, version
from pathlib import Path

import av
import imagecodecs
import numpy as np
import simplejpeg
import soundfile
import soxr
from PIL import Image
from sklearn.datasets import load_sample_image

from benchmarks.side_by_side import seconds, write
from data_pipeline.reading.decode import decode_image, decode_sound, decode_video
from data_pipeline.reading.medium import Medium

RATE = 16_000
FRAMES = 8
SECONDS = 30
COLUMNS = ("case", "kB", "decoder", "ms", "times ours", "largest difference", "rounds")

LIBRARIES = (
    *("pillow", "simplejpeg", "imagecodecs", "soundfile", "av", "soxr"),
    *("opencv-python-headless", "torchvision", "miniaudio"),
)

Decoder = Callable[[bytes], np.ndarray]


def is_installed(name: str) -> bool:
    return any(True for _ in distributions(name=name))


def photo(width: int, height: int) -> np.ndarray:
    """A photograph; beyond 2 megapixels four mirrored copies, so that detail does not vanish."""
    if width * height > 2_000_000:
        part = photo(width // 2, height // 2)
        top = np.concatenate([part, part[:, ::-1]], axis=1)
        return np.concatenate([top, top[::-1]])
    image = Image.fromarray(load_sample_image("china.jpg"))
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))


def voice(rate: int, channels: int) -> np.ndarray:
    """Gliding harmonics that swell like syllables, with some noise: ``[samples, channels]``."""
    noise = np.random.default_rng(0).normal(0, 0.01, (SECONDS * rate, channels))
    time = np.arange(SECONDS * rate) / rate
    phase = 2 * np.pi * np.cumsum(120 + 30 * np.sin(2 * np.pi * 0.7 * time)) / rate
    tone = sum(np.sin(k * phase) / k for k in range(1, 20)) * np.sin(2 * np.pi * 3 * time) ** 2
    return (0.05 * tone[:, None] + noise).astype(np.float32)


def moving_photo(codec: str, form: str) -> bytes:
    """Ten seconds of a photograph that moves to the left, 640 x 480, 25 frames a second."""
    still = photo(640, 480)
    file = io.BytesIO()
    with av.open(file, "w", format=form) as container:
        stream = container.add_stream(codec, rate=25)
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height, stream.pix_fmt = 640, 480, "yuv420p"
        for step in range(250):
            shifted = np.ascontiguousarray(np.roll(still, -2 * step, axis=1))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(shifted, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def picture_decoders(form: str) -> dict[str, Decoder]:
    def ours(data: bytes) -> np.ndarray:
        return decode_image(Medium("image", data, "bench"))

    def pillow(data: bytes) -> np.ndarray:
        with Image.open(io.BytesIO(data)) as image:
            return np.asarray(image)

    def pyav(data: bytes) -> np.ndarray:
        with av.open(io.BytesIO(data), mode="r") as container:
            container.streams.video[0].codec_context.thread_count = 1
            return next(container.decode(video=0)).to_ndarray(format="rgb24")

    direct: dict[str, tuple[str, Decoder]] = {
        "JPEG": ("simplejpeg", lambda data: simplejpeg.decode_jpeg(data, "RGB")),
        "PNG": ("imagecodecs", imagecodecs.spng_decode),
        "WEBP": ("imagecodecs", imagecodecs.webp_decode),
    }
    name, decoder = direct[form]
    found: dict[str, Decoder] = {"ours": ours, name: decoder, "Pillow": pillow, "PyAV": pyav}
    if importlib.util.find_spec("cv2"):
        import cv2

        cv2.setNumThreads(1)
        found["OpenCV"] = lambda data: cv2.imdecode(
            np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB
        )
    if importlib.util.find_spec("torchvision"):
        import torch
        from torchvision import io as vision

        torch.set_num_threads(1)
        found["torchvision"] = lambda data: (
            vision.decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), "RGB")
            .permute(1, 2, 0)
            .numpy()
        )
    return found


def sound_decoders(channels: int, rate: int) -> dict[str, Decoder]:
    def mono(samples: np.ndarray, own: int) -> np.ndarray:
        mean = samples[:, 0] if channels == 1 else (samples[:, 0] + samples[:, 1]) / 2
        return mean if own == RATE else soxr.resample(mean, own, RATE, quality="HQ")

    def ours(data: bytes) -> np.ndarray:
        return decode_sound(Medium("speech", data, "bench"), SECONDS)

    def libsndfile(data: bytes) -> np.ndarray:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            return mono(file.read(dtype="float32", always_2d=True), file.samplerate)

    def pyav(data: bytes) -> np.ndarray:
        with av.open(io.BytesIO(data), mode="r") as container:
            stream = container.streams.audio[0]
            stream.codec_context.thread_count = 1
            blocks = []
            for frame in container.decode(stream):
                raw = frame.to_ndarray()
                block = raw.T if frame.format.is_planar else raw.reshape(-1, channels)
                full = 1 if block.dtype.kind == "f" else 2 ** (8 * block.itemsize - 1)
                blocks.append(block.astype(np.float32) / full)
            return mono(np.concatenate(blocks), stream.codec_context.sample_rate)

    found: dict[str, Decoder] = {"ours": ours, "soundfile": libsndfile, "PyAV": pyav}
    if importlib.util.find_spec("miniaudio"):
        import miniaudio

        def mini(data: bytes) -> np.ndarray:
            kind = miniaudio.SampleFormat.FLOAT32
            decoded = miniaudio.decode(data, kind, channels, rate)
            return mono(np.frombuffer(decoded.samples, np.float32).reshape(-1, channels), rate)

        found["miniaudio"] = mini
    return found


def video_decoders(place: Path) -> dict[str, Decoder]:
    wanted = [(2 * i + 1) * 250 // (2 * FRAMES) for i in range(FRAMES)]

    def ours(data: bytes) -> np.ndarray:
        return decode_video(Medium("video", data, "bench"), FRAMES)

    def pyav(data: bytes) -> np.ndarray:
        with av.open(io.BytesIO(data), mode="r") as container:
            container.streams.video[0].codec_context.thread_count = 1
            frames = container.decode(video=0)
            return np.stack(
                [f.to_ndarray(format="rgb24") for i, f in enumerate(frames) if i in wanted]
            )

    found: dict[str, Decoder] = {"ours": ours, "PyAV, every frame": pyav}
    if importlib.util.find_spec("cv2"):
        import cv2

        def opencv(data: bytes) -> np.ndarray:
            place.write_bytes(data)  # it reads files only
            capture = cv2.VideoCapture(str(place), cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
            frames = []
            for index in range(wanted[-1] + 1):
                capture.grab()
                if index in wanted:
                    frames.append(cv2.cvtColor(capture.retrieve()[1], cv2.COLOR_BGR2RGB))
            return np.stack(frames)

        found["OpenCV, every frame"] = opencv
    return found


def measure(case: str, data: bytes, decoders: dict[str, Decoder], rounds: int) -> list[str]:
    """One row for each decoder; they take turns."""
    truth = decoders["ours"](data).astype(np.float64)
    rows: dict[str, tuple[list[float], str]] = {}
    for name, decoder in decoders.items():
        try:
            result = decoder(data)
        except Exception:
            rows[name] = ([], "refuses")
            continue
        same = result.shape == truth.shape
        rows[name] = ([], f"{np.abs(result - truth).max():.3g}" if same else "another length")
    for _ in range(rounds):
        for name, (times, note) in rows.items():
            if note != "refuses":
                times.append(seconds(lambda: decoders[name](data)))  # noqa: B023
    ours = statistics.median(rows["ours"][0])
    table = []
    for name, (times, note) in rows.items():
        middle = statistics.median(times) if times else float("nan")
        cells = [f"{middle * 1e3:.2f}", f"{middle / ours:.2f}"] if times else ["", ""]
        table.append([case, f"{len(data) / 1000:.0f}", name, *cells, note, str(len(times))])
    return ["| " + " | ".join(row) + " |" for row in table]


def sound_file(samples: np.ndarray, rate: int, form: str, subtype: str | None) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=form, subtype=subtype)
    return file.getvalue()


def aac_file(samples: np.ndarray, rate: int) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=rate)
        stream.layout = layout = "mono" if samples.shape[1] == 1 else "stereo"
        for start in range(0, len(samples), 1024):
            block = np.ascontiguousarray(samples[start : start + 1024].T)
            frame = av.AudioFrame.from_ndarray(block, format="fltp", layout=layout)
            frame.sample_rate, frame.pts = rate, start
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


def main() -> None:
    rows: list[str] = []
    for width, height, rounds in ((640, 480, 41), (4000, 3000, 9)):
        image = Image.fromarray(photo(width, height))
        for form, options in (("JPEG", {"quality": 90}), ("PNG", {}), ("WEBP", {"quality": 90})):
            file = io.BytesIO()
            image.save(file, form, **options)
            case = f"{form} {width} x {height}"
            rows += measure(case, file.getvalue(), picture_decoders(form), rounds)
    for rate, channels in ((16_000, 1), (48_000, 2)):
        samples = voice(rate, channels)
        files = {
            "WAV": sound_file(samples, rate, "WAV", None),
            "FLAC": sound_file(samples, rate, "FLAC", None),
            "MP3": sound_file(samples, rate, "MP3", None),
            "Vorbis": sound_file(samples, rate, "OGG", "VORBIS"),
            "Opus": sound_file(samples, rate, "OGG", "OPUS"),
            "AAC": aac_file(samples, rate),
        }
        for form, data in files.items():
            case = (
                f"{form} {SECONDS} s, {rate // 1000} kHz, {'mono' if channels == 1 else 'stereo'}"
            )
            rows += measure(case, data, sound_decoders(channels, rate), 9)
    with tempfile.TemporaryDirectory() as folder:
        for codec, form in (("libx264", "mp4"), ("libvpx-vp9", "webm")):
            case = f"{codec} in {form}, {FRAMES} of 250 frames"
            decoders = video_decoders(Path(folder) / "clip")
            rows += measure(case, moving_photo(codec, form), decoders, 5)
    notes = (
        "`ours` is the whole of `decode_*`: header, limits and checks included, the others decode "
        "and nothing else. The difference is in grey levels (0 to 255) or of full scale 1.",
        "miniaudio was not taken although it reads WAV and FLAC faster: it skips damaged frames of "
        "a FLAC file without a word. torchcodec needs FFmpeg's libraries installed in the system.",
        ", ".join(f"{name} {version(name)}" for name in LIBRARIES if is_installed(name)),
    )
    write("decoders", "Decoders by type, one thread", rows, COLUMNS, notes)


if __name__ == "__main__":
    main()
