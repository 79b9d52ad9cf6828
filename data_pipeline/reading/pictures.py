"""Pixels of a picture: libjpeg-turbo, libspng and libwebp directly, and Pillow for all else.

Pillow reads every header: size, orientation and transparency are its word. The pixels of plain
JPEG, PNG and WebP files then come from simplejpeg and imagecodecs, which write them straight
into the array (Pillow copies them three times). They are the same bits. What is not plain
(palettes, transparency, sixteen bits, CMYK, ...) and what those libraries refuse is Pillow's.
"""

from __future__ import annotations

import io

import imagecodecs
import numpy as np
import simplejpeg
from PIL import Image, ImageOps

from data_pipeline.reading.limits import LIMITS, blame, refuse_size
from data_pipeline.reading.medium import Medium

# Formats that hold pictures of data sets. Pillow knows many more; some start other programs.
_PICTURES = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM")
_ORIENTATION = 0x0112
_PNG_PLAIN = b"\x08\x02"  # eight bits, red green blue
_PNG_PLAIN_PLACE = 24  # byte of the file
_PNG_FIRST_CHUNK = 8  # byte of the file
_PNG_MOST_CHUNKS = 100_000
# Chunks by which a PNG moves or is turned, and keys of text that may turn it.
_PNG_CHUNKS = (b"acTL", b"eXIf")
_PNG_TEXTS = (b"Raw profile type", b"XML:com.adobe.xmp")


def decode_image(
    medium: Medium, max_pixels: int = LIMITS.max_pixels, max_bytes: int = LIMITS.max_bytes
) -> np.ndarray:
    """Decode a picture as a viewer shows it: upright, transparent parts on white.

    Of a picture that moves this is the first frame; the others are not decompressed.

    Args:
        medium: a JPEG, PNG, WebP, GIF, BMP or PPM file.
        max_pixels: pictures with more pixels are refused before they are decompressed.
        max_bytes: larger files are refused unseen.

    Returns:
        uint8 ``[height, width, 3]``, RGB.

    Raises:
        BrokenMediumError: not a picture, truncated, or too large.
    """
    with (
        blame(medium, "picture", max_bytes),
        Image.open(io.BytesIO(medium.data), formats=_PICTURES) as image,
    ):
        refuse_size(medium, *image.size, max_pixels)
        pixels = _directly(medium.data, image)
        if pixels is not None:
            return pixels
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        return np.asarray(_to_rgb(image))


def probe_image(medium: Medium, max_pixels: int = LIMITS.max_pixels) -> tuple[int, int]:
    """Width and height that a picture's header claims; nothing is decompressed.

    Raises:
        BrokenMediumError: not a picture, or too large.
    """
    with (
        blame(medium, "picture", LIMITS.max_bytes),
        Image.open(io.BytesIO(medium.data), formats=_PICTURES) as image,
    ):
        refuse_size(medium, *image.size, max_pixels)
        return image.size


def moves(data: bytes) -> bool:
    """Whether a picture that can be decoded has several frames of one animation.

    The frames of an MPO are not: they are a still picture and its previews, depth, or other eye.
    """
    with Image.open(io.BytesIO(data), formats=_PICTURES) as image:
        return image.format != "MPO" and _moves(image)


def _directly(data: bytes, image: Image.Image) -> np.ndarray | None:
    """The pixels of a plain file, upright; None where Pillow must decide."""
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    try:
        if image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L"):
            if simplejpeg.decode_jpeg_header(data)[:2] != pixels.shape[:2]:
                return None
            # Strict: what libjpeg-turbo only warns of, such as missing pixels, Pillow judges.
            simplejpeg.decode_jpeg(data, "RGB", buffer=pixels, strict=True)
            return _upright(pixels, image.getexif().get(_ORIENTATION, 1))
        if image.format == "PNG" and _is_plain_png(data, image):
            # Not png_decode: it never lets go of the array when a file is damaged.
            return imagecodecs.spng_decode(data, out=pixels)
        if image.format == "WEBP" and image.mode == "RGB" and not _moves(image):
            imagecodecs.webp_decode(data, out=pixels)
            return _upright(pixels, image.getexif().get(_ORIENTATION, 1))
    except (ValueError, RuntimeError):  # theirs are among these
        return None
    return None


def _moves(image: Image.Image) -> bool:
    return bool(getattr(image, "is_animated", False))


def _is_plain_png(data: bytes, image: Image.Image) -> bool:
    """Whether it is eight bits of red, green and blue, upright, opaque and still.

    Pillow knows whether it is upright only when it has decompressed it all.
    """
    if not data.startswith(_PNG_PLAIN, _PNG_PLAIN_PLACE) or image.has_transparency_data:
        return False
    place = _PNG_FIRST_CHUNK
    for _ in range(_PNG_MOST_CHUNKS):
        if place >= len(data):
            return True
        kind = data[place + 4 : place + 8]
        if kind in _PNG_CHUNKS or data.startswith(_PNG_TEXTS, place + 8):
            return False
        place += 12 + int.from_bytes(data[place : place + 4], "big")
    return False


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Undo EXIF's eight ways of holding a camera."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("floating-point pixels have no agreed range")
    if image.mode.startswith("I"):
        # Sixteen-bit grey: Pillow's own conversion clips everything above 255 to white.
        grey = np.clip(np.asarray(image).astype(np.int64) >> 8, 0, 255).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if image.has_transparency_data:
        layered = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), layered).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")
