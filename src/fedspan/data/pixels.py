"""The pixels of an image as uint8, whatever they were: 16 bits, floats, palettes, transparency, turned by a camera.

* 8 bits and booleans keep their values: a boolean is black or white.
* More bits, and floats, are scaled linearly: `limits` = (black, white), or without them the smallest and the largest
  value of each image by itself, so that an image is the same at every site and in every split. Nothing saturates then;
  a difference in brightness between two images is lost, which `limits` keeps.
* Transparent pixels show white behind them, as in a viewer; the colours that they hide are not seen.
* A picture is turned the way that its EXIF orientation says.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fedspan.support.errors import FedspanError

Range = tuple[float, float] | None
_AT_ONCE = 64
_DEEP = ("I", "I;16", "I;16L", "I;16B", "I;16N", "F")
"""PIL's modes of more than 8 bits, which its own conversion cuts off at 255."""
_ANIMATIONS = ("GIF", "PNG", "WEBP", "TIFF")
"""Formats whose further frames are pictures in their own right; those of a JPEG are previews and depths."""


def is_image(array: np.ndarray) -> bool:
    """Return whether an array has the shape (H, W) or (H, W, 3)."""
    return array.ndim == 2 or (array.ndim == 3 and array.shape[-1] == 3)


def as_uint8(values: np.ndarray, source: str, limits: Range) -> np.ndarray:
    """Return images of one size, (N, H, W, 3), (N, H, W, 1) or (N, H, W), as uint8 without an axis of length 1.

    Raises
    ------
    FedspanError
        For another shape or type, and for values that are not finite.
    """
    array = values[..., 0] if values.ndim == 4 and values.shape[-1] == 1 else values
    if array.dtype.kind not in "buif" or not is_image(array[0] if len(array) else array):
        first = values.ndim == 4 and values.shape[1] in (1, 3)
        hint = "; channels come last, as numpy.moveaxis(images, 1, -1) puts them" if first else ""
        raise FedspanError(
            f"{source} holds images as {values.dtype} {values.shape}: expected uint8 (N, H, W, 3) or (N, H, W), or "
            f"other numbers in these shapes{hint}"
        )
    if not array.size and len(array):
        raise FedspanError(f"{source} holds images without a pixel, {values.shape}: expected at least one in each")
    if array.dtype == np.uint8:
        return array
    scaled = np.empty(array.shape, dtype=np.uint8)
    for start in range(0, len(array), _AT_ONCE):
        part = array[start : start + _AT_ONCE]
        _check_finite(part, source, start)
        scaled[start : start + _AT_ONCE] = _scaled(part, tuple(range(1, part.ndim)), limits)
    return scaled


def _check_finite(part: np.ndarray, source: str, start: int) -> None:
    finite = np.isfinite(part).reshape(len(part), -1).all(axis=1)
    if not finite.all():
        raise FedspanError(f"row {start + int(np.argmin(finite)) + 1} of {source} has a pixel that is not finite")


def _scaled(array: np.ndarray, axes: tuple[int, ...] | None, limits: Range) -> np.ndarray:
    """Return finite numbers as uint8: v -> 255 (v - black) / (white - black), rounded; all 0 where both are equal."""
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * np.uint8(255)
    exact = array.astype(np.float64)
    if limits is None:
        black, white = exact.min(axis=axes, keepdims=True), exact.max(axis=axes, keepdims=True)
    else:
        black, white = np.float64(limits[0]), np.float64(limits[1])
    width = np.where(white > black, white - black, 1.0)
    scaled: np.ndarray = np.rint(np.clip((exact - black) / width, 0.0, 1.0) * 255.0)
    return scaled.astype(np.uint8)


def from_picture(picture: Any, name: str, limits: Range) -> np.ndarray:
    """Return a PIL image as an array, (H, W) where it is grey and (H, W, 3) where it has colours.

    Parameters
    ----------
    name
        Its name in messages.

    Raises
    ------
    FedspanError
        For an animation, and for values that are not finite.
    """
    from PIL import ImageOps

    frames = getattr(picture, "n_frames", 1)
    if frames > 1 and picture.format in _ANIMATIONS:
        raise FedspanError(f"{name} is a series of {frames} pictures: expected one")
    picture = ImageOps.exif_transpose(picture)
    if picture.mode in _DEEP:
        pixels = np.asarray(picture)
        if not np.isfinite(pixels).all():
            raise FedspanError(f"{name} has a pixel that is not finite: expected numbers")
        return _scaled(pixels, None, limits)
    if picture.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in picture.info:
        picture = _before_white(picture)
    return np.asarray(picture.convert("L" if picture.mode in ("1", "L") else "RGB"))


def _before_white(picture: Any) -> Any:
    """Return a picture with white behind its transparent pixels, grey where it was."""
    from PIL import Image

    grey = picture.mode in ("LA", "La", "L", "1")
    opaque = Image.new("RGBA", picture.size, "white")
    opaque.alpha_composite(picture.convert("RGBA"))
    return opaque.convert("L" if grey else "RGB")
