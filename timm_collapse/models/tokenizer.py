"""Images to the tokens that are dropped, kept and reconstructed: pixel patches, or latents of a VAE."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..hub.vae_weights import load_vae
from ..order import CollapseError, check_images


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
        in_chans: Image channels.
    """

    def __init__(self, patch_size: int, in_chans: int = 3):
        super().__init__()
        self.patch_size = patch_size
        self.dim = in_chans * patch_size**2

    def grid(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Patch grid (h, w) of an image size (H, W) in pixels."""
        return image_size[0] // self.patch_size, image_size[1] // self.patch_size

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, N, dim).

        Raises:
            CollapseError: The image sides are not multiples of the patch size.
        """
        check_images(images)
        h, w = images.shape[-2:]
        if h % self.patch_size or w % self.patch_size:
            raise CollapseError(f"images: sides must be multiples of patch_size={self.patch_size}, got {h}x{w}")
        return patchify(images, self.patch_size)

    def decode(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, N, dim) -> images (B, C, H, W)."""
        return unpatchify(tokens, grid, self.patch_size)


class VaeTokenizer(nn.Module):
    """One token per latent position of a diffusers AutoencoderKL, scaled to about unit variance.

    MAR's KL-16 (256 px -> 256 tokens of 16 channels) is the paper's setting; its weights in diffusers' layout are on
    the Hub as `xwen99/mar-vae-kl16`. The VAE is frozen and takes pixels in [-1, 1].

    Args:
        vae: A loaded `diffusers.AutoencoderKL`, a Hub id, or a local folder.
        scale: Factor on the latents (.2325 for KL-16); None takes the VAE's own `scaling_factor`.
        patch_size: Latent positions per token side.
    """

    def __init__(self, vae: nn.Module | str, scale: float | None = None, patch_size: int = 1):
        super().__init__()
        self.vae = vae = load_vae(vae)
        self.scale = float(vae.config.scaling_factor if scale is None else scale)
        self.patch_size = patch_size
        self.factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.dim = vae.config.latent_channels * patch_size**2

    def grid(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Token grid (h, w) of an image size (H, W) in pixels."""
        side = self.factor * self.patch_size
        return image_size[0] // side, image_size[1] // side

    def train(self, mode: bool = True) -> VaeTokenizer:
        return super().train(False)  # frozen: no dropout, no statistics

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> posterior means (B, N, dim)."""
        check_images(images)
        side = self.factor * self.patch_size
        if images.shape[-2] % side or images.shape[-1] % side:
            raise CollapseError(f"images: sides must be multiples of {side}, got {tuple(images.shape[-2:])}")
        return patchify(self.vae.encode(images).latent_dist.mean * self.scale, self.patch_size)

    @torch.no_grad()
    def decode(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, N, dim) -> images (B, 3, H, W) in [-1, 1]."""
        return self.vae.decode(unpatchify(tokens, grid, self.patch_size) / self.scale).sample


def resize_images(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Antialiased bilinear resize of (B, C, H, W); the identity where the size fits."""
    if tuple(images.shape[-2:]) == tuple(size):
        return images
    return F.interpolate(images, size, mode="bilinear", antialias=True, align_corners=False)
