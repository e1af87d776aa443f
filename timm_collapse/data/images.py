"""Photo files to tensors: whatever a camera, a scanner or a web page hands over becomes an upright RGB image."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms import functional as F

from ..order import CollapseError

MAX_RATIO = 32  # of the sides of an image that is resized as a whole


def load_photo(path: str | Path) -> Image.Image:
    """Reads a photo as `decode_image` does.

    Args:
        path: A file in any format that Pillow reads.

    Returns:
        An image of mode "RGB".

    Raises:
        CollapseError: For a missing or unreadable file, a folder, or what `decode_image` refuses.
    """
    try:
        file = open(path, "rb")
    except OSError as error:
        raise CollapseError(f"image: cannot read {path}: {error.strerror}") from error
    with file:
        return decode_image(file, f"image: {path}")


def decode_image(file: bytes | BinaryIO, name: str) -> Image.Image:
    """Decodes an image as 8-bit RGB, upright: what every command and every data set of this package does.

    The EXIF orientation is applied. Transparent pixels are laid over white, 16-bit grey levels are scaled to 8 bits (a
    plain `convert` would clip them at 255), CMYK, palette, grey and bilevel images are converted; of an animation the
    first frame is taken. Colour profiles are not applied.

    Args:
        file: The encoded image, or an open file of it.
        name: What an error message begins with, such as "image: a.png".

    Returns:
        An image of mode "RGB".

    Raises:
        CollapseError: For what is no image, a damaged or truncated one, one of more pixels than Pillow's
            decompression-bomb limit (179 million by default), or pixels without a known range (floating point, 32-bit
            integers).
    """
    # Pillow's warnings (odd metadata, sizes of half the limit) would only scatter lines around the result
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = Image.open(io.BytesIO(file) if isinstance(file, bytes) else file)
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return _to_rgb(image, name)
        except CollapseError:
            raise
        except UnidentifiedImageError as error:
            raise CollapseError(f"{name} is not an image in a format that Pillow reads") from error
        except Image.DecompressionBombError as error:
            limit = 2 * Image.MAX_IMAGE_PIXELS // 10**6
            raise CollapseError(f"{name} is too large, more than {limit} million pixels") from error
        except Exception as error:  # decoders raise whatever they stumble over: OSError, SyntaxError, struct.error, ...
            raise CollapseError(f"{name} is damaged or truncated: {error}") from error


class Cover:
    """Resizes an image so that it just covers a size (antialiased bicubic), and crops the centre.

    For a square that is torchvision's Resize and CenterCrop, bit for bit.

    Args:
        size: Side of a square, or height and width, in pixels.
    """

    def __init__(self, size: int | tuple[int, int]):
        self.height, self.width = (size, size) if isinstance(size, int) else size

    def __call__(self, image: Image.Image) -> Image.Image:
        short = min(image.size)
        if max(image.size) > MAX_RATIO * short:  # a thin strip, resized as a whole, would fill the memory
            image = F.center_crop(image, [min(side, MAX_RATIO * short) for side in (image.height, image.width)])
        if self.height * image.width >= self.width * image.height:
            size = [self.height, max(self.width, int(self.height * image.width / image.height))]
        else:
            size = [max(self.height, int(self.width * image.height / image.width)), self.width]
        image = F.resize(image, size, F.InterpolationMode.BICUBIC)
        return F.center_crop(image, [self.height, self.width])


def photo_tensor(image: Image.Image, size: int | tuple[int, int]) -> Tensor:
    """An image as a tensor, of a size as `Cover` gives it.

    Args:
        image: RGB.
        size: Side of a square, or height and width, in pixels.

    Returns:
        (3, height, width) float32 in [0, 1].
    """
    return F.to_tensor(Cover(size)(image)).contiguous()


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    """8-bit RGB of an image of any mode."""
    if image.mode.startswith("I"):  # "I;16" and its byte orders; "I" holds the 16 bits of PGM and old TIFF
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise CollapseError(f"{name} has 32-bit pixels beyond the 16-bit range; save it with 8 or 16 bits")
        return Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise CollapseError(f"{name} has floating-point pixels of unknown range; save it with 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
