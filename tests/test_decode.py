"""Pictures as people have them: EXIF orientation, transparency, formats."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, ImageOps

from mtl_dist.data.decode import BACKGROUND, as_jpeg, decode, decode_picture

ORIENTATION = 0x0112


def saved(image: Image.Image, kind: str, orientation: int | None = None, **options) -> bytes:
    data, exif = io.BytesIO(), Image.Exif()
    if orientation is not None:
        exif[ORIENTATION] = orientation
    image.save(data, kind, exif=exif, **options)
    return data.getvalue()


def quarters() -> Image.Image:
    """40 x 24 pixels, no two corners alike."""
    pixels = np.full((24, 40, 3), 100, np.uint8)
    pixels[:12, :20], pixels[:12, 20:], pixels[12:, :20] = 250, 180, 30
    return Image.fromarray(pixels)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", [*range(1, 9)])
def test_a_picture_is_turned_as_its_exif_says(kind, orientation):
    data = saved(quarters(), kind, orientation, quality=95)
    with Image.open(io.BytesIO(data)) as image:
        wanted = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    found = decode_picture(data)
    np.testing.assert_array_equal(found.pixels, wanted)
    assert found.pixels.shape[:2] == ((40, 24) if orientation > 4 else (24, 40))
    assert (found.orientation, found.width, found.height) == (orientation, 40, 24)
    ignored = decode_picture(data, exif="ignore")
    assert ignored.orientation == orientation
    stored = decode_picture(saved(quarters(), kind, quality=95)).pixels
    np.testing.assert_array_equal(ignored.pixels, stored)
    small = decode_picture(data, 16).pixels.astype(int)
    corners = small[[1, 1, -2, -2], [1, -2, 1, -2], 0]
    assert np.abs(corners - wanted[[1, 1, -2, -2], [1, -2, 1, -2], 0]).max() < 12


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "tiff_adobe_deflate"])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
def test_a_tiff_is_turned_or_not_as_every_other_kind_however_it_is_packed(mode, compression):
    image, scratch = quarters().convert(mode), np.empty(10_000, np.uint8)
    lying = saved(image, "TIFF", 6, compression=compression)
    upright = saved(image.transpose(Image.Transpose.ROTATE_270), "TIFF", compression=compression)
    assert as_jpeg(lying, scratch) == (as_jpeg(upright, scratch).jpeg, 6)
    as_stored = saved(image, "TIFF", compression=compression)
    assert as_jpeg(lying, scratch, exif="ignore") == (as_jpeg(as_stored, scratch).jpeg, 6)


@pytest.mark.parametrize("orientation", [0, 9, None])
def test_an_orientation_that_is_none_turns_nothing(orientation):
    assert decode_picture(saved(quarters(), "JPEG", orientation)).orientation == 1


def test_words_that_look_like_exif_turn_nothing():
    data = saved(quarters(), "JPEG", comment=b"Exif\0\0MM")
    assert decode_picture(data).orientation == 1
    assert as_jpeg(data, np.empty(10_000, np.uint8)) == (data, 1)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_what_is_hidden_below_alpha_does_not_matter(kind):
    pixels = np.random.default_rng(0).integers(0, 255, (2, 30, 30, 4), np.uint8)
    pixels[1] = pixels[0]
    pixels[:, :15, :, 3], pixels[:, 15:, :, 3] = 0, 128
    pixels[0, :15, :, :3] = 200
    files = [
        saved(Image.fromarray(each), kind, **({"lossless": True, "exact": True} if kind == "WEBP" else {}))
        for each in pixels
    ]
    assert files[0] != files[1]
    found = [decode_picture(data).pixels.astype(int) for data in files]
    np.testing.assert_array_equal(*found)
    assert (found[0][:15] == BACKGROUND).all()
    assert np.abs(found[0][15:] - pixels[0, 15:, :, :3] / 2).max() <= 1  # half seen on black
    scratch = np.empty(10_000, np.uint8)
    assert as_jpeg(files[0], scratch).jpeg == as_jpeg(files[1], scratch).jpeg


@pytest.mark.parametrize(("mode", "seen"), [("P", 7), ("L", 100), ("RGB", (9, 9, 9))])
def test_a_colour_that_a_picture_calls_transparent_is_the_background(mode, seen):
    data = saved(Image.new(mode, (4, 4), seen), "PNG", transparency=seen)
    assert (decode_picture(data).pixels == BACKGROUND).all()


@pytest.mark.parametrize("orientation", range(2, 9))
def test_what_a_shard_holds_of_a_lying_jpeg_is_upright_and_equal_each_time(orientation):
    data, scratch = saved(quarters(), "JPEG", orientation, quality=95), np.empty(10_000, np.uint8)
    stored = as_jpeg(data, scratch)
    assert stored == as_jpeg(data, scratch)
    assert stored.orientation == orientation
    upright = decode_picture(data).pixels.astype(int)
    assert np.abs(decode(stored.jpeg).astype(int) - upright).max() < 16
    assert b"Exif" not in stored.jpeg
    assert as_jpeg(data, scratch, exif="ignore") == (data, orientation)
