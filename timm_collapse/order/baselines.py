"""Orders that need no training: what every collapse order is compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .constants import constant
from .errors import CollapseError, check_grid, check_images
from .spread import bayer_ranks, halton_ranks

Baseline = Callable[[Tensor, tuple[int, int], "torch.Generator | None"], Tensor]


def baseline_scores(name: str, images: Tensor, grid: Sequence[int], generator: torch.Generator | None = None) -> Tensor:
    """Scores of patches by a baseline.

    Args:
        name: One of BASELINES.
        images: (B, C, H, W) floating point and finite, any number of channels; their values matter to "variance",
            "centre_variance" and "gradient" only.
        grid: Rows and columns of patches (h, w). Where they do not divide H and W, patches are widened to whole pixels.
        generator: The source of randomness of "random", on any device; torch's own by default.

    Returns:
        (B, N) float32, higher = earlier, N = h * w in row-major order.

    Raises:
        CollapseError: For an unknown name (the message lists the known ones), wrong images or a wrong grid.
    """
    if name not in BASELINES:
        raise CollapseError(f"name must be one of the baselines {', '.join(BASELINES)}, got {name!r}")
    check_images(images, channels=None)
    return BASELINES[name](images, check_grid(grid), generator)


def _random(images: Tensor, grid: tuple[int, int], generator: torch.Generator | None) -> Tensor:
    """Uniform scores: every order is equally likely."""
    device = images.device if generator is None else generator.device
    return torch.rand(images.shape[0], grid[0] * grid[1], generator=generator, device=device).to(images.device)


def _raster(images: Tensor, grid: tuple[int, int], generator: torch.Generator | None) -> Tensor:
    """Row by row from the top left."""
    return _fixed(_raster_ranks, images, grid)


def _centre(images: Tensor, grid: tuple[int, int], generator: torch.Generator | None) -> Tensor:
    """Minus the distance to the centre of the grid, in patches."""
    y, x = (torch.arange(side, device=images.device) - (side - 1) / 2 for side in grid)
    return -torch.hypot(y[:, None], x[None, :]).flatten().expand(images.shape[0], -1)


def _halton(images: Tensor, grid: tuple[int, int], generator: torch.Generator | None) -> Tensor:
    """First visits of the Halton sequence."""
    return _fixed(halton_ranks, images, grid)


def _bayer(images: Tensor, grid: tuple[int, int], generator: torch.Generator | None) -> Tensor:
    """The recursive checkerboard, coarse to fine."""
    return _fixed(bayer_ranks, images, grid)


def _variance(images: Tensor, grid: tuple[int, int], generator: torch.Generator | None) -> Tensor:
    """Variance of the values of a patch, over all its pixels and channels together."""
    images = images.float()
    images = images - images.mean(dim=(1, 2, 3), keepdim=True)  # E[x^2] - E[x]^2 cancels less about the mean
    mean = F.adaptive_avg_pool2d(images.mean(dim=1, keepdim=True), grid)
    square = F.adaptive_avg_pool2d(images.square().mean(dim=1, keepdim=True), grid)
    return (square - mean.square()).clamp_min(0).flatten(1)


def _centre_variance(images: Tensor, grid: tuple[int, int], generator: torch.Generator | None) -> Tensor:
    """Standard deviation of a patch times how near the centre it lies: people photograph what they mean there."""
    return _variance(images, grid, generator).sqrt() * constant(_centre_weights, grid, device=images.device)


def _gradient(images: Tensor, grid: tuple[int, int], generator: torch.Generator | None) -> Tensor:
    """Mean magnitude of the gradient over the pixels and channels of a patch, by differences to the next pixel.

    Central differences would be blind to the finest texture, which alternates from pixel to pixel.
    """
    padded = F.pad(images.float(), (0, 1, 0, 1), mode="replicate")
    magnitude = torch.hypot(padded.diff(dim=3)[:, :, :-1], padded.diff(dim=2)[:, :, :, :-1])
    return F.adaptive_avg_pool2d(magnitude.mean(dim=1, keepdim=True), grid).flatten(1)


def _centre_weights(grid: tuple[int, int]) -> Tensor:
    """(N,): a Gaussian about the centre, with a deviation of 3/8 of each side."""
    y, x = ((2 * torch.arange(side) + 1 - side) / side for side in grid)  # in (-1, 1)
    return torch.exp((y[:, None].square() + x.square()) / (-2 * 0.75**2)).flatten()


def _raster_ranks(grid: tuple[int, int]) -> Tensor:
    return torch.arange(grid[0] * grid[1])


def _fixed(ranks: Callable[[tuple[int, int]], Tensor], images: Tensor, grid: tuple[int, int]) -> Tensor:
    """The scores (N - rank) / N of one order for all images."""
    return constant(_scores, ranks, grid, device=images.device).expand(images.shape[0], -1)


def _scores(ranks: Callable[[tuple[int, int]], Tensor], grid: tuple[int, int]) -> Tensor:
    ranks = ranks(grid)
    return (len(ranks) - ranks).float() / len(ranks)


BASELINES: dict[str, Baseline] = {
    "random": _random,
    "raster": _raster,
    "centre": _centre,
    "halton": _halton,
    "bayer": _bayer,
    "variance": _variance,
    "centre_variance": _centre_variance,
    "gradient": _gradient,
}

UNCERTAINTIES = ("variance", "centre_variance", "gradient")
"""The baselines whose scores are a property of the patch itself, at least 0, which weights can multiply."""
