"""Between images and the latents of about unit variance that a generator models: z-scored pixels, or those of a VAE."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

from ..hub.vae_weights import load_kl16
from ..hub.weight_files import SUFFIXES
from ..order import CollapseError, check_images
from .vae import FrozenVae


class PixelCodec(nn.Module):
    """Latents are pixels in units of the standard deviation; nothing is lost and there is no posterior noise.

    Args:
        mean, std: Of the data, a channel, for pixels in [0, 1].
    """

    channels, stride, scale = 3, 1, 1.0

    def __init__(self, mean=(0.5,) * 3, std=(0.25,) * 3):
        super().__init__()
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise CollapseError(f"mean, std: must be three numbers each, std positive, got {mean} and {std}")
        self.identity: dict[str, Any] = {"kind": "pixels", "mean": [*map(float, mean)], "std": [*map(float, std)]}
        self.register_buffer("mean", torch.tensor(self.identity["mean"]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(self.identity["std"]).view(3, 1, 1), persistent=False)

    def moments(self, images: Tensor) -> tuple[Tensor, None]:
        """Images (B, 3, H, W) in [0, 1] -> (latents (B, 3, H, W), None).

        Raises:
            CollapseError: Images of another shape, dtype or range.
        """
        _check_pixels(images)
        return (images - self.mean.to(images)) / self.std.to(images), None

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, 3, H, W) -> images, clamped to [0, 1]."""
        return (latents * self.std.to(latents) + self.mean.to(latents)).clamp(0, 1)


class VaeCodec(FrozenVae):
    """Latents of a VAE, for images in [0, 1]; the arguments are those of `FrozenVae`."""

    @property
    def identity(self) -> dict[str, Any]:
        """What the latents depend on: the weights, by a hash, and the scale."""
        digest = hashlib.sha256()
        for name, value in sorted(self.vae.state_dict().items()):
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return {"kind": "vae", "weights": digest.hexdigest()[:16], "scale": self.scale, "shift": self.shift}

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) in [0, 1] -> mean and standard deviation of the posterior, (B, C, h, w) float32 each.

        Raises:
            CollapseError: Images of another shape, dtype or range, or sides that are not multiples of the stride.
        """
        _check_pixels(images)
        return self.encode(2 * images - 1)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) -> images (B, 3, H, W) float32, clamped to [0, 1]."""
        return (self.reconstruct(latents) / 2 + 0.5).clamp(0, 1)


def load_codec(name: str, scale: float | None = None) -> PixelCodec | VaeCodec:
    """A codec by its name.

    Args:
        name: "pixels"; a local folder or Hub id of a diffusers AutoencoderKL; or a file of MAR's KL-16 as published.
        scale: Of a VAE's latents; None takes its own.

    Raises:
        CollapseError: Nothing of that name, or a scale for pixels.
    """
    if name == "pixels":
        if scale is not None:
            raise CollapseError(f"scale: is for a VAE, pixels have none, got {scale}")
        return PixelCodec()
    return VaeCodec(load_kl16(name) if name.endswith(SUFFIXES) else name, scale)


def _check_pixels(images: Tensor) -> None:
    check_images(images)
    low, high = images.aminmax()
    if low < -1e-3 or high > 1 + 1e-3:
        raise CollapseError(f"images: pixels must be in [0, 1], not normalised, got {low:.3g} to {high:.3g}")
