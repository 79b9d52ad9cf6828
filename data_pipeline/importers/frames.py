"""Frames of a video that come as pictures become a clip that the decoder of videos reads.

JPEG files go into the clip as they are (Motion JPEG in Matroska), so that nothing is compressed
twice. Other frames, or frames of several sizes, are decoded and stored losslessly (FFV1); then all
have the size of the first, as the decoder would make them anyway. How fast the frames follow one
another is not known: it is one a second.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import av
import numpy as np
from av.container import OutputContainer
from av.video.stream import VideoStream
from PIL import Image

from data_pipeline.reading.decode import LIMITS, BrokenMediumError, decode_image
from data_pipeline.reading.medium import Medium

ENDING = "mkv"
_ORIENTATION = 0x0112  # EXIF's tag of how the camera was held


def clip_of(frames: Sequence[Medium]) -> bytes:
    """A Matroska file with these frames, in their order.

    Args:
        frames: pictures, at least one.

    Raises:
        BrokenMediumError: a frame is no picture, or there are more than the decoder takes.
    """
    if len(frames) > LIMITS.max_frames:
        raise BrokenMediumError(
            frames[0].source, f"{len(frames)} frames are more than {LIMITS.max_frames}"
        )
    size = _plain_jpeg(frames[0].data)
    file = io.BytesIO()
    with av.open(file, "w", format="matroska", options={"fflags": "+bitexact"}) as container:
        if size is not None and all(_plain_jpeg(frame.data) == size for frame in frames):
            _mux(container, frames, size)
        else:
            _encode(container, frames)
    return file.getvalue()


def _plain_jpeg(data: bytes) -> tuple[int, int] | None:
    """Width and height of a JPEG file that every decoder shows alike; None for all else."""
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            upright = image.getexif().get(_ORIENTATION, 1) == 1
            return image.size if upright and image.mode in ("RGB", "L") else None
    except Exception:  # whatever Pillow raises on hostile bytes: decoding will say what is wrong
        return None


def _stream(
    container: OutputContainer, codec: str, pixels: str, size: tuple[int, int]
) -> VideoStream:
    stream = container.add_stream(codec, rate=1)
    assert isinstance(stream, VideoStream)  # of a codec for video
    stream.width, stream.height = size
    stream.pix_fmt = pixels
    return stream


def _mux(container: OutputContainer, frames: Sequence[Medium], size: tuple[int, int]) -> None:
    stream = _stream(container, "mjpeg", "yuvj420p", size)
    container.start_encoding()
    for number, frame in enumerate(frames):
        packet = av.Packet(frame.data)
        packet.stream = stream
        packet.time_base = stream.codec_context.time_base
        packet.pts = packet.dts = number
        packet.is_keyframe = True
        container.mux(packet)


def _encode(container: OutputContainer, frames: Sequence[Medium]) -> None:
    first = decode_image(frames[0], LIMITS.max_frame_pixels)
    height, width = first.shape[:2]
    stream = _stream(container, "ffv1", "bgr0", (width, height))
    for number, frame in enumerate(frames):
        pixels = decode_image(frame, LIMITS.max_frame_pixels) if number else first
        if pixels.shape != first.shape:
            resized = Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR)
            pixels = np.asarray(resized)
        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
        picture.pts = number
        container.mux(stream.encode(picture))
    container.mux(stream.encode())
