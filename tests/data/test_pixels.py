"""Images of any depth, mode and orientation as they look, in 8 bits."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_helpers import LABELS, fails, images, read
from PIL import Image

from fedspan.data.images import as_images, decode
from fedspan.support.errors import FedspanError

RAMP = np.arange(64).reshape(8, 8)


def encoded(picture: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, form, **options)
    return stream.getvalue()


@pytest.mark.parametrize("top", [255, 4095, 65535])
@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_grey_of_16_bits_keeps_its_shades(top: int, form: str) -> None:
    """A ramp of 12 bits in 16, as X-rays have it, is a ramp and not white; by its own range, or by a given one."""
    values = (RAMP * top // 63).astype(np.uint16)
    content = encoded(Image.fromarray(values), form)
    expected = np.rint((values - values.min()) / (values.max() - values.min()) * 255)
    np.testing.assert_array_equal(decode(content, "x", None), expected)
    np.testing.assert_array_equal(decode(content, "x", None, (0, 65535)), np.rint(values / 65535 * 255))
    assert decode(content, "x", None, (0, top / 2)).max() == 255


def test_grey_of_32_bits_and_floats() -> None:
    shades = np.rint(RAMP / 63 * 255)
    for values in ((RAMP * 1000 - 9000).astype(np.int32), (RAMP / 63 - 0.5).astype(np.float32)):
        content = encoded(Image.fromarray(values), "TIFF")
        np.testing.assert_array_equal(decode(content, "x", None), shades)
    flat = encoded(Image.fromarray(np.full((4, 4), 1234, dtype=np.uint16)))
    assert not decode(flat, "x", None).any()
    broken = RAMP.astype(np.float32)
    broken[2, 2] = np.nan
    with pytest.raises(FedspanError, match="x has a pixel that is not finite"):
        decode(encoded(Image.fromarray(broken), "TIFF"), "x", None)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64, np.float16, np.float32, np.float64, np.bool_])
def test_arrays_of_other_types_are_scaled_image_by_image(tmp_path: Path, dtype: type) -> None:
    """So that an image is the same in any file, split and site, whatever lies beside it."""
    pictures = images() % 2 if dtype is np.bool_ else images()
    low, high = pictures.min((1, 2, 3), keepdims=True).astype(float), pictures.max((1, 2, 3), keepdims=True)
    expected = np.rint((pictures - low) / (high - low) * 255)
    np.savez(tmp_path / "a.npz", x=pictures.astype(dtype), y=LABELS)
    path = str(tmp_path / "a.npz")
    np.testing.assert_array_equal(read(train=path, test=path).train.inputs, expected)
    if dtype is not np.bool_:
        np.testing.assert_array_equal(read(train=path, test=path, image_range=(0, 255)).train.inputs, pictures)
    single = as_images(pictures[:1].astype(dtype), "a", None)
    np.testing.assert_array_equal(single[0], expected[0])


def test_eight_bits_are_left_as_they_are() -> None:
    picture = images(1)[0]
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(picture)), "x", None, (0, 10)), picture)
    np.testing.assert_array_equal(as_images(picture[None], "x", None, (0, 10))[0], picture)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_as_its_camera_says(orientation: int) -> None:
    """By the value of each corner: the stored top left pixel is white."""
    corner = {1: (0, 0), 2: (0, -1), 3: (-1, -1), 4: (-1, 0), 5: (0, 0), 6: (0, -1), 7: (-1, -1), 8: (-1, 0)}
    stored = np.zeros((6, 10, 3), dtype=np.uint8)
    stored[0, 0] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    shown = decode(encoded(Image.fromarray(stored), exif=exif), "x", None)
    assert shown.shape == ((6, 10, 3) if orientation < 5 else (10, 6, 3))
    assert shown[corner[orientation]].tolist() == [255] * 3
    assert shown.sum() == 3 * 255


def test_what_is_transparent_is_white() -> None:
    """Black strokes on transparent black are not a black picture."""
    colours = np.zeros((4, 4, 4), dtype=np.uint8)
    colours[1, 1] = (0, 0, 0, 255)
    colours[2, 2] = (255, 0, 0, 128)
    expected = np.full((4, 4, 3), 255, dtype=np.uint8)
    expected[1, 1] = 0
    expected[2, 2] = (255, 127, 127)
    drawn = Image.fromarray(colours)
    np.testing.assert_array_equal(decode(encoded(drawn), "x", None), expected)
    grey = drawn.convert("LA")
    assert decode(encoded(grey), "x", None).shape == (4, 4)
    assert decode(encoded(grey), "x", None)[0, 0] == 255
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([0, 0, 0, 0, 0, 255])
    palette.putpixel((1, 0), 1)
    shown = decode(encoded(palette, transparency=0), "x", None)
    assert shown[0, 0].tolist() == [255] * 3
    assert shown[0, 1].tolist() == [0, 0, 255]


def test_modes_become_grey_or_colour() -> None:
    picture = Image.fromarray(images(1)[0])
    np.testing.assert_array_equal(
        decode(encoded(picture.convert("CMYK"), "TIFF"), "x", None), np.asarray(picture.convert("CMYK").convert("RGB"))
    )
    one = decode(encoded(picture.convert("1")), "x", None)
    assert one.ndim == 2
    assert set(np.unique(one)) == {0, 255}
    colours = picture.quantize(8)
    np.testing.assert_array_equal(decode(encoded(colours), "x", None), np.asarray(colours.convert("RGB")))


def test_an_animation_is_no_image_and_a_cut_file_neither() -> None:
    frames = [Image.fromarray(image) for image in images(3)]
    for form in ("GIF", "PNG", "TIFF", "WEBP"):
        content = encoded(frames[0], form, save_all=True, append_images=frames[1:])
        with pytest.raises(FedspanError, match="x is a series of 3 pictures: expected one"):
            decode(content, "x", None)
    whole = encoded(Image.fromarray(images(1, size=64)[0]))
    with pytest.raises(FedspanError, match="x is not a readable image"):
        decode(whole[: len(whole) // 2], "x", None)


def test_a_range_is_two_numbers(tmp_path: Path) -> None:
    from fedspan.config import from_mapping

    for wrong in ([1, 1], [2, 1], [1], "a"):
        with pytest.raises(FedspanError, match=r"data.image_range = .*|expected two numbers"):
            from_mapping({"data": {"image_range": wrong}})
    np.savez(tmp_path / "a.npz", x=images().astype(np.complex64), y=LABELS)
    fails("complex64", train=str(tmp_path / "a.npz"))
