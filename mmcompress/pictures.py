# SPDX-License-Identifier: Apache-2.0
"""Opening pictures: whatever a picture comes as, the same pixels at every entrance."""

from __future__ import annotations

import base64
import io
import os
import re
from collections.abc import Callable
from typing import IO, Any, TypeAlias

import numpy as np
from PIL import Image, ImageOps

Picture: TypeAlias = "str | os.PathLike[str] | bytes | IO[bytes] | Image.Image | np.ndarray | Callable[[], Image.Image]"
"""A path, the bytes of a file, a file opened for reading bytes, a data: address, a Pillow image, an array or tensor (uint8 [height,
width, 3 or 4] or [3, height, width], or grey [height, width] of any type), or a function that draws it."""

WHITES = (255, 65535)
"""Greys of 8 and of 16 bits."""


class PictureError(ValueError):
    """A picture that cannot be read."""


def open_picture(source: Picture, name: str = "") -> Image.Image:
    """The picture upright and in RGB, as `transformers.image_utils.load_image` gives it: of an animation the first frame, turned if
    its file says that it lies on its side, alpha left out. Greys of more than 8 bits are scaled, not cut off at 255 (see `to_rgb`).

    name  what errors call it; by default its path or what it is.

    Raises PictureError (a ValueError) that names the picture and says why it cannot be read, TypeError for what is no picture.
    """
    name = name or _name(source)
    if not (is_picture(source) or hasattr(source, "ndim")):
        raise TypeError(f"a picture of type {type(source).__name__}: give a path, bytes, a PIL image or an array")
    try:
        return to_rgb(ImageOps.exif_transpose(_opened(source, name)))
    except PictureError:
        raise
    except Exception as error:  # decoders meet foreign bytes: they raise whatever they stumble over
        raise PictureError(f"{name} is not a readable picture ({_reason(error)})") from error


def is_picture(source: Any) -> bool:
    """One picture, rather than a list of them (a video is one array of four dimensions)."""
    one = isinstance(source, (str, os.PathLike, bytes, bytearray, memoryview, Image.Image))
    return one or hasattr(source, "read") or callable(source) or getattr(source, "ndim", 0) in (2, 3)


def picture_size(source: Picture) -> tuple[int, int]:
    """Width and height as stored, without decoding; (0, 0) if they cannot be told."""
    try:
        drawn: Any = source  # what draws a picture may know its size
        return drawn.size if callable(drawn) and hasattr(drawn, "size") else _opened(drawn, "").size
    except Exception:  # as above
        return (0, 0)


def to_rgb(picture: Image.Image) -> Image.Image:
    """A Pillow image in RGB, neither turned nor with its alpha laid over anything.

    Greys of 16 bits lose their low byte, as 16-bit colours do in Pillow. Modes that do not say what white is (I, integers; F,
    floats) are read by their values: up to 1 (floats only) white is 1, up to 255 it is 255, up to 65535 it is 65535. Raises
    ValueError for values outside.
    """
    if picture.mode == "F" or picture.mode.startswith("I"):
        values = np.asarray(picture)
        low, high = float(values.min()), float(values.max())
        white = 65535 if picture.mode.startswith("I;") else next((w for w in WHITES if high <= w), 0)
        if picture.mode == "F" and high < 2:  # between 1 and 2: a little over white, or nearly black?
            white = 1 if high <= 1 else 0
        if not (low >= 0 and white):
            raise ValueError(
                f"its greys run from {low:g} to {high:g}, and nothing says what white is: scale them to 0 to 1 (floats), 0 to 255 "
                f"or 0 to 65535"
            )
        scaled = values.astype(np.int64) >> 8 if white == 65535 else np.rint(values * (255 // white))
        picture = Image.fromarray(scaled.astype(np.uint8))
    if picture.mode in ("La", "RGBa"):  # alpha multiplied in: Pillow knows one way out only
        picture = picture.convert(picture.mode.upper())
    return picture.convert("RGB")


def _opened(source: Any, name: str) -> Image.Image:
    """Pillow's image, not decoded where it comes from a file."""
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, str) and source.startswith("data:"):
        source = base64.b64decode(source.partition(",")[2])
    if isinstance(source, (bytes, bytearray, memoryview)):
        if not len(source):
            raise OSError("it is empty")
        return Image.open(io.BytesIO(source))
    if isinstance(source, (str, os.PathLike)):
        if re.match(r"\w+://", str(source)):
            raise PictureError(f"{name} is an address: pictures are not fetched; store it as a file, or give its bytes")
        if os.path.isdir(source):
            raise PictureError(f"{name}: a folder; give a picture in it")
        if not os.path.exists(source):
            raise PictureError(f"{name}: no such file")
        if not os.path.getsize(source) and os.path.isfile(source):
            raise OSError("the file is empty")
        return Image.open(source)
    if hasattr(source, "read"):
        return Image.open(source)
    if callable(source):
        return source()
    return Image.fromarray(_array(source))


def _array(source: Any) -> np.ndarray:
    """uint8 [height, width, 3 or 4], or grey [height, width] of a type that Pillow knows."""
    values = np.asarray(source.detach().cpu() if hasattr(source, "detach") else source)
    if values.ndim == 3 and values.shape[0] in (1, 3) and values.shape[2] not in (1, 3, 4):
        values = values.transpose(1, 2, 0)
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[..., 0]
    colours = values.ndim == 3 and values.shape[2] in (3, 4) and values.dtype == np.uint8
    if not values.size or not (colours or (values.ndim == 2 and values.dtype.kind in "buif")):
        raise PictureError(
            f"a picture of shape {values.shape} and type {values.dtype}: give uint8 [height, width, 3], or greys [height, width]"
        )
    if values.dtype.kind == "f":
        values = values.astype(np.float32)
    elif values.dtype.kind == "i" or values.dtype.itemsize > 2:
        values = values.clip(-1, min(np.iinfo(values.dtype).max, 1 << 30)).astype(np.int32)
    return np.ascontiguousarray(values)


def _name(source: Any) -> str:
    """What an error calls a picture."""
    if isinstance(source, (str, os.PathLike)):
        said = str(source)
        return said if len(said) <= 300 else f"{said[:60]}... ({len(said)} characters)"
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"a picture of {len(source)} bytes"
    return str(getattr(source, "filename", "") or getattr(source, "name", "") or "a picture")


def _reason(error: Exception) -> str:
    if isinstance(error, Image.DecompressionBombError):
        return f"{error}; if you trust it, raise PIL.Image.MAX_IMAGE_PIXELS"
    if isinstance(error, Image.UnidentifiedImageError):
        return "its bytes are of no picture format that Pillow knows"
    return str(error) or type(error).__name__
