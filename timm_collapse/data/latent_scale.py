"""How a VAE's latents are distributed, and the factor that gives them unit variance."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from ..models.codec import PixelCodec, VaeCodec
from ..order import CollapseError


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
