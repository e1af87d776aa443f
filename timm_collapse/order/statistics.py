"""How much orders agree: with each other, and from image to image."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .errors import CollapseError
from .order import Order


class ImageDependence(NamedTuple):
    """How much of an order is one fixed map: 1 = the same map for all images, 0 = the images are unrelated.

    Attributes:
        pairwise_spearman: Mean Spearman correlation of the orders of two different images, in [-1/(B-1), 1].
        prior_share: Share of the variance of an image's ranks that the mean map of the OTHER images explains (R^2).
            Equals (B * pairwise_spearman - 1) / (B - 1): below zero where that map predicts worse than none does.
    """

    pairwise_spearman: float
    prior_share: float


def spearman(a: Order, b: Order) -> Tensor:
    """Spearman's rank correlation of two orders, image by image.

    Args:
        a: The order of B images, on a grid of at least two patches.
        b: The order of B images, or of one that is compared with all (so may a be), on the same grid.

    Returns:
        (B,) float32 in [-1, 1].

    Raises:
        CollapseError: Where grids or batch sizes do not match, or there is only one patch.
    """
    _check_pair(a, b)
    n = a.num_patches
    squares = (a.ranks - b.ranks).square().sum(dim=1)  # exact: integers
    return 1 - 6 * squares.float() / (n * (n * n - 1))


def image_dependence(order: Order) -> ImageDependence:
    """How much the order depends on the image, in O(B N).

    Args:
        order: The order of at least two images, on a grid of at least two patches.

    Returns:
        See `ImageDependence`.

    Raises:
        CollapseError: For fewer images or patches.
    """
    size, n = len(order), order.num_patches
    if size < 2 or n < 2:
        raise CollapseError(f"order must have at least two images and two patches, got {order!r}")
    centred = (2 * order.ranks - (n - 1)).sum(dim=0)  # twice the sum of the centred ranks, exact
    # the squared length of the sum of B unit vectors is B plus all B (B - 1) products of two different ones
    length = centred.cpu().double().square().sum().item() / (n * (n * n - 1) / 3)
    correlation = (length - size) / (size * (size - 1))
    return ImageDependence(correlation, (size * correlation - 1) / (size - 1))


def _check_pair(a: Order, b: Order) -> None:
    if a.grid != b.grid or a.num_patches < 2:
        raise CollapseError(f"a and b must share one grid of at least two patches, got the grids {a.grid} and {b.grid}")
    if len(a) != len(b) and 1 not in (len(a), len(b)):
        raise CollapseError(f"a and b must have as many images (or one), got {len(a)} and {len(b)}")
    if a.scores.device != b.scores.device:
        raise CollapseError(f"a and b must be on one device, got {a.scores.device} and {b.scores.device}")
