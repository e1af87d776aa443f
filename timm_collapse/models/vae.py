"""A frozen variational autoencoder: between pixels and latents of about unit variance."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..hub.vae_weights import load_vae
from ..order import CollapseError


class FrozenVae(nn.Module):
    """A diffusers AutoencoderKL whose latents are normalised, `(z - shift) * scale`, the shift that of its config or 0.

    Args:
        vae: A loaded AutoencoderKL, a Hub id, or a local folder in diffusers' layout.
        scale: Factor that gives the latents unit variance (see `latent_scale`); None takes the VAE's `scaling_factor`.

    Attributes:
        channels: Of the latents. stride: Pixels per latent position and side.

    Raises:
        CollapseError: There is no such VAE, or the scale is not positive and finite.
    """

    def __init__(self, vae: nn.Module | str, scale: float | None = None):
        super().__init__()
        self.vae = load_vae(vae)
        config = self.vae.config
        self.scale = float(config.scaling_factor if scale is None else scale)
        if not 0 < self.scale < float("inf"):
            raise CollapseError(f"scale: must be positive and finite, got {self.scale}")
        self.shift = float(config.shift_factor or 0)
        self.channels = config.latent_channels
        self.stride = 2 ** (len(config.block_out_channels) - 1)

    def train(self, mode: bool = True) -> FrozenVae:
        return super().train(False)  # frozen: no dropout, no statistics

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels (B, 3, H, W) in [-1, 1] -> mean and standard deviation of the posterior, (B, C, h, w) float32 each.

        Raises:
            CollapseError: Sides that are not multiples of the stride; all else is for the caller to check.
        """
        if pixels.shape[-2] % self.stride or pixels.shape[-1] % self.stride:
            raise CollapseError(f"images: sides must be multiples of {self.stride}, got {tuple(pixels.shape[-2:])}")
        posterior = self.vae.encode(pixels.to(self.vae.dtype)).latent_dist
        return (posterior.mean.float() - self.shift) * self.scale, posterior.std.float() * self.scale

    @torch.no_grad()
    def reconstruct(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) -> pixels (B, 3, H, W) float32, about in [-1, 1]."""
        return self.vae.decode((latents / self.scale + self.shift).to(self.vae.dtype)).sample.float()
