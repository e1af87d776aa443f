"""Photo files of every kind become upright RGB, or one clear error."""

import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from timm_collapse.data.images import load_photo, photo_tensor
from timm_collapse.order import CollapseError


def colours(image, *points):
    return [image.getpixel(point) for point in points]


def test_rgb_is_read_as_it_is(tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    Image.fromarray(values).save(tmp_path / "a.png")
    photo = load_photo(tmp_path / "a.png")
    assert photo.mode == "RGB" and (np.asarray(photo) == values).all()
    assert (np.asarray(load_photo(str(tmp_path / "a.png"))) == values).all()


@pytest.mark.parametrize("mode, pixel, rgb", [("L", 100, (100,) * 3), ("1", 255, (255,) * 3)])
def test_grey_and_bilevel(tmp_path, mode, pixel, rgb):
    Image.new(mode, (4, 4), pixel).save(tmp_path / "a.png")
    assert colours(load_photo(tmp_path / "a.png"), (0, 0)) == [rgb]


def test_palette(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 0])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "a.gif")
    assert colours(load_photo(tmp_path / "a.gif"), (0, 0), (1, 0)) == [(10, 20, 30), (200, 100, 0)]


def test_palette_with_a_transparent_colour_lies_over_white(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 0])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "a.png", transparency=0)
    assert colours(load_photo(tmp_path / "a.png"), (0, 0), (1, 0)) == [(255, 255, 255), (200, 100, 0)]


@pytest.mark.parametrize("mode, black", [("RGBA", (0, 0, 0)), ("LA", (0,))])
def test_alpha_lies_over_white(tmp_path, mode, black):
    image = Image.new(mode, (3, 1))
    for x, alpha in enumerate((0, 102, 255)):
        image.putpixel((x, 0), (*black, alpha))
    image.save(tmp_path / "a.png")
    assert colours(load_photo(tmp_path / "a.png"), (0, 0), (1, 0), (2, 0)) == [(v,) * 3 for v in (255, 153, 0)]


@pytest.mark.parametrize("suffix", ["jpg", "tif"])
def test_cmyk(tmp_path, suffix):
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / f"a.{suffix}")
    ((r, g, b),) = colours(load_photo(tmp_path / f"a.{suffix}"), (4, 4))
    assert r > 240 and g < 15 and b < 15


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_16_bit_grey_is_scaled_and_not_clipped(tmp_path, suffix):
    values = np.array([[0, 257 * 100, 257 * 200, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / f"a.{suffix}")
    expected = [(v,) * 3 for v in (0, 100, 200, 255)]
    assert colours(load_photo(tmp_path / f"a.{suffix}"), *((x, 0) for x in range(4))) == expected


@pytest.mark.parametrize("orientation, corner", [(1, (0, 0)), (3, (3, 1)), (6, (1, 0)), (8, (0, 3))])
def test_exif_orientation_is_applied(tmp_path, orientation, corner):
    image = Image.new("RGB", (4, 2), "black")
    image.putpixel((0, 0), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "a.png", exif=exif)
    photo = load_photo(tmp_path / "a.png")
    assert photo.size == ((2, 4) if orientation in (6, 8) else (4, 2))
    assert photo.getpixel(corner) == (255, 0, 0)


def test_the_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert colours(load_photo(tmp_path / "a.gif"), (0, 0)) == [(255, 0, 0)]


def png_header(width, height):
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")


def noise_file(path, suffix):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path.with_suffix(suffix))
    return path.with_suffix(suffix)


def make_bad(kind, path):
    if kind == "folder":
        path.mkdir()
    elif kind == "empty":
        path.touch()
    elif kind == "text":
        path.write_text("no image at all")
    elif kind == "bomb":
        path.write_bytes(png_header(100_000, 100_000))
    elif kind == "float":
        Image.new("F", (4, 4), 0.5).save(path, format="TIFF")
    elif kind == "32 bits":
        Image.new("I", (4, 4), 70_000).save(path, format="TIFF")
    return path


@pytest.mark.parametrize(
    "kind, message",
    [
        ("missing", "cannot read .*No such file"),
        ("folder", "cannot read .*[Dd]irectory"),
        ("empty", "not an image"),
        ("text", "not an image"),
        ("bomb", "too large, more than 178 million pixels"),
        ("float", "floating-point"),
        ("32 bits", "beyond the 16-bit range"),
    ],
)
def test_bad_files_are_refused_by_name(tmp_path, kind, message):
    path = make_bad(kind, tmp_path / "bad")
    with pytest.raises(CollapseError, match=message) as error:
        load_photo(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".gif", ".tif", ".bmp", ".webp"])
def test_truncated_files_are_refused_without_warnings(tmp_path, suffix):
    path = noise_file(tmp_path / "a", suffix)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(CollapseError, match="damaged or truncated|not an image"):
            load_photo(path)
    assert not caught


def test_photo_tensor_has_the_values_of_an_image_of_its_size():
    values = torch.randint(0, 256, (6, 8, 3), dtype=torch.uint8)
    pixels = photo_tensor(Image.fromarray(values.numpy()), (6, 8))
    assert pixels.dtype == torch.float32 and pixels.is_contiguous()
    assert torch.equal(pixels, values.permute(2, 0, 1) / 255)


@pytest.mark.parametrize("shape", [(30, 90), (90, 30), (300, 900), (1, 40)])
def test_photo_tensor_crops_the_centre(shape):
    height, width = shape
    # dark to bright along the longer side
    ramp = np.linspace(0, 255, max(shape)).astype(np.uint8)
    values = np.broadcast_to(ramp[None, :] if width > height else ramp[:, None], shape)
    pixels = photo_tensor(Image.fromarray(values).convert("RGB"), 30)
    side = min(shape)
    assert pixels.shape == (3, 30, 30) and 0 <= pixels.min() and pixels.max() <= 1
    assert abs(float(pixels.mean()) - 0.5) < 0.02
    assert float(pixels.max() - pixels.min()) == pytest.approx(side / max(shape), abs=0.06)


def test_photo_tensor_of_a_rectangle():
    assert photo_tensor(Image.new("RGB", (50, 40)), (16, 32)).shape == (3, 16, 32)
