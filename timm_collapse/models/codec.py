"""Between images and the latents of about unit variance that a generator models: z-scored pixels, or those of a VAE."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..hub.vae_weights import load_kl16, load_vae
from ..order import CollapseError, check_images

WEIGHT_FILES = (".safetensors", ".ckpt", ".pth", ".pt")


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
        _check_pixels(images, self.stride)
        return (images - self.mean.to(images)) / self.std.to(images), None

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, 3, H, W) -> images, clamped to [0, 1]."""
        return (latents * self.std.to(latents) + self.mean.to(latents)).clamp(0, 1)


class VaeCodec(nn.Module):
    """Latents of a frozen diffusers AutoencoderKL, `(z - shift) * scale`, the shift being that of its config (or 0).

    Args:
        vae: A loaded AutoencoderKL, a Hub id, or a local folder in diffusers' layout.
        scale: Factor that gives the latents unit variance (see `latent_scale`); None takes the VAE's `scaling_factor`.

    Attributes:
        channels: Of the latents. stride: Pixels per latent position and side.
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

    @property
    def identity(self) -> dict[str, Any]:
        """What the latents depend on: the weights, by a hash, and the scale."""
        digest = hashlib.sha256()
        for name, value in sorted(self.vae.state_dict().items()):
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return {"kind": "vae", "weights": digest.hexdigest()[:16], "scale": self.scale, "shift": self.shift}

    def train(self, mode: bool = True) -> VaeCodec:
        return super().train(False)  # frozen: no dropout, no statistics

    @torch.no_grad()
    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) in [0, 1] -> mean and standard deviation of the posterior, (B, C, h, w) float32 each.

        Raises:
            CollapseError: Images of another shape, dtype or range, or sides that are not multiples of the stride.
        """
        _check_pixels(images, self.stride)
        posterior = self.vae.encode((2 * images - 1).to(self.vae.dtype)).latent_dist
        return (posterior.mean.float() - self.shift) * self.scale, posterior.std.float() * self.scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) -> images (B, 3, H, W) float32, clamped to [0, 1]."""
        decoded = self.vae.decode((latents / self.scale + self.shift).to(self.vae.dtype)).sample
        return (decoded.float() / 2 + 0.5).clamp(0, 1)


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
    return VaeCodec(load_kl16(name) if name.endswith(WEIGHT_FILES) else name, scale)


class LatentStatistics(NamedTuple):
    """Statistics of unscaled latents, posterior noise included.

    Attributes:
        scale: Recommended: 1 / std.
        std: Over all channels, positions and images, about `mean`.
        mean: Over all of them.
        channel_std: (C,) of each channel about its own mean.
        images: Number of images.
        difference: Between the scales of every second image and of the others: how far `scale` may be off.
    """

    scale: float
    std: float
    mean: float
    channel_std: tuple[float, ...]
    images: int
    difference: float


def latent_scale(codec: PixelCodec | VaeCodec, image_batches: Iterable[Tensor]) -> LatentStatistics:
    """Measures the factor that gives a VAE's latents unit variance, as a generator expects them.

    The noise of the posterior counts by its expected variance, so that nothing is random.

    Args:
        image_batches: (B, 3, H, W) in [0, 1] each, on the codec's device.

    Raises:
        CollapseError: Fewer than two images, or latents that are all equal.
    """
    sums = torch.zeros(2, 2, codec.channels, dtype=torch.float64)  # halves; first and second moment; channels
    counts = [0, 0]
    images_seen = 0
    for images in image_batches:
        mean, std = codec.moments(images)
        mean = mean.double() / codec.scale
        second = mean.square() if std is None else mean.square() + (std.double() / codec.scale).square()
        for half in (0, 1):
            own = slice((half - images_seen) % 2, None, 2)
            counts[half] += len(mean[own])
            sums[half] += torch.stack([x[own].mean((2, 3)).sum(0) for x in (mean, second)]).cpu()
        images_seen += len(images)
    if min(counts) < 1:
        raise CollapseError(f"image_batches: the scale needs at least 2 images, got {images_seen}")

    def deviation(moments: Tensor) -> Tensor:
        return (moments[1] - moments[0].square()).clamp(min=0).sqrt()

    whole = sums.sum(0) / images_seen
    std = float(deviation(whole.mean(1)))
    halves = [float(deviation((sums[half] / counts[half]).mean(1))) for half in (0, 1)]
    if min(std, *halves) <= 0:
        raise CollapseError("image_batches: all latents are equal, they have no scale")
    difference = abs(1 / halves[0] - 1 / halves[1])
    return LatentStatistics(
        1 / std, std, float(whole[0].mean()), tuple(deviation(whole).tolist()), images_seen, difference
    )


def _check_pixels(images: Tensor, stride: int) -> None:
    check_images(images)
    if images.shape[-2] % stride or images.shape[-1] % stride:
        raise CollapseError(f"images: sides must be multiples of {stride}, got {tuple(images.shape[-2:])}")
    low, high = images.aminmax()
    if low < -1e-3 or high > 1 + 1e-3:
        raise CollapseError(f"images: pixels must be in [0, 1], not normalised, got {low:.3g} to {high:.3g}")
