"""Images to the tokens that are dropped, kept and reconstructed: pixel patches, or latents of a VAE."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..order import CollapseError, check_images
from .vae import FrozenVae


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """(B, C, H, W) -> (B, N, C p p): features in the order c p q, patches row by row."""
    return rearrange(images, "b c (h p) (w q) -> b (h w) (c p q)", p=patch_size, q=patch_size)


def unpatchify(tokens: Tensor, grid: tuple[int, int], patch_size: int) -> Tensor:
    """Inverse of `patchify`."""
    return rearrange(tokens, "b (h w) (c p q) -> b c (h p) (w q)", h=grid[0], w=grid[1], p=patch_size, q=patch_size)


class PixelTokenizer(nn.Module):
    """Square patches of normalised pixels (z-scores, so that L1 errors are in standard deviations of the data).

    Args:
        patch_size: Patch side in pixels.
    """

    def __init__(self, patch_size: int):
        super().__init__()
        self.patch_size = patch_size
        self.dim = 3 * patch_size**2

    def grid(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Patch grid (h, w) of an image size (H, W) in pixels."""
        return image_size[0] // self.patch_size, image_size[1] // self.patch_size

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, N, dim).

        Raises:
            CollapseError: The image sides are not multiples of the patch size.
        """
        check_images(images)
        h, w = images.shape[-2:]
        if h % self.patch_size or w % self.patch_size:
            raise CollapseError(f"images: sides must be multiples of patch_size={self.patch_size}, got {h}x{w}")
        return patchify(images, self.patch_size)

    def decode(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, N, dim) -> images (B, 3, H, W)."""
        return unpatchify(tokens, grid, self.patch_size)


class VaeTokenizer(FrozenVae):
    """One token per latent position of a VAE.

    MAR's KL-16 (256 px -> 256 tokens of 16 channels) is the paper's setting; its weights in diffusers' layout are on
    the Hub as `xwen99/mar-vae-kl16`.

    Args:
        vae, scale: As of `FrozenVae`.
    """

    def __init__(self, vae: nn.Module | str, scale: float | None = None):
        super().__init__(vae, scale)
        self.dim = self.channels

    def grid(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Token grid (h, w) of an image size (H, W) in pixels."""
        return image_size[0] // self.stride, image_size[1] // self.stride

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> normalised posterior means (B, N, dim)."""
        check_images(images)
        return patchify(self.encode(images)[0], 1)

    def decode(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, N, dim) -> images (B, 3, H, W), about in [-1, 1]."""
        return self.reconstruct(unpatchify(tokens, grid, 1))


def resize_images(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Antialiased bilinear resize of (B, C, H, W); the identity where the size fits."""
    if tuple(images.shape[-2:]) == tuple(size):
        return images
    exact = images.to(torch.promote_types(images.dtype, torch.float32))  # CPUs cannot do it in half
    return F.interpolate(exact, size, mode="bilinear", antialias=True, align_corners=False).to(images.dtype)
