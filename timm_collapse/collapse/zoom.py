"""A zoomed picture: downscaled on a grid whose rows and columns are narrow where the order comes early.

Everywhere else tokens stand for cells of one size, or of some; here their rows and columns have a width each, so that
the tokens still lie on a grid, as a ViT knows it. Rows and columns that are resampled apart from each other are those
of "Learning to Zoom and Unzoom" (arXiv 2303.15390), after "Learning to Zoom" (arXiv 1809.03355); here the collapse
order tells where.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..order import Order
from ..order.precision import without_autocast

SMOOTHING = 0.2
"""Window of the means that smooth the densities of an axis, as a share of its patches; taken twice."""

LATEST = 0.5
"""Share of the patches that count, the first ones most; all later ones count as none."""


def zoom_densities(order: Order, share: float) -> tuple[Tensor, Tensor]:
    """How narrow rows and columns are to be: cells a patch, up to a factor.

    Args:
        order: Of the patches; those after its first half count alike.
        share: Of the cells that lie evenly, whatever the order; in (0, 1].

    Returns:
        Rows (B, h) and columns (B, w), each with mean 1, at least `share`.
    """
    early = (1 - order.ranks.float() / (LATEST * order.num_patches)).clamp_min(0).unflatten(1, order.grid)
    return tuple(_density(early.mean(dim), side, share) for dim, side in zip((2, 1), order.grid, strict=True))


def _density(early: Tensor, side: int, share: float) -> Tensor:
    reach = round(SMOOTHING * side / 2)
    for _ in range(2):
        early = F.avg_pool1d(early, 2 * reach + 1, 1, reach, count_include_pad=False)
    return share + (1 - share) * early / early.mean(1, keepdim=True)


def axis_edges(density: Tensor, cells: int) -> Tensor:
    """(B, n) densities of the n parts of an axis -> (B, cells + 1) edges in [0, n], with equal mass between them.

    Args:
        density: Greater than 0.
        cells: Intervals.
    """
    mass = density / density.sum(1, keepdim=True)
    before = (mass.cumsum(1) - mass).unsqueeze(1)
    target = torch.arange(cells + 1, device=density.device, dtype=density.dtype) / cells
    return ((target[:, None] - before) / mass.unsqueeze(1)).clamp(0, 1).sum(2)  # of each part, what lies below


def resample_axes(images: Tensor, densities: tuple[Tensor, Tensor], size: tuple[int, int]) -> Tensor:
    """Images resized with rows and columns of the given densities: `resize_images` where these are even.

    Args:
        images: (B, C, H, W).
        densities: (B, h) and (B, w).
        size: Of the result.
    """
    rows, columns = (_filters(*axis) for axis in zip(densities, size, images.shape[-2:], strict=True))
    with without_autocast(images):
        return (rows.unsqueeze(1) @ images.to(rows.dtype) @ columns.mT.unsqueeze(1)).to(images.dtype)


def _filters(density: Tensor, new: int, old: int) -> Tensor:
    """(B, new, old): antialiased linear interpolation, triangles as wide as their two pixels; rows sum to 1."""
    edges = axis_edges(density, new) * (old / density.shape[1])
    centres, widths = (edges[:, 1:] + edges[:, :-1]) / 2, (edges[:, 1:] - edges[:, :-1]).clamp_min(1)
    pixels = torch.arange(old, device=density.device) + 0.5
    weights = (1 - (pixels - centres.unsqueeze(2)).abs() / widths.unsqueeze(2)).clamp_min(0)
    return weights / weights.sum(2, keepdim=True)


def places_of_intervals(edges: Tensor) -> Tensor:
    """(B, n + 1) edges -> (B, n) long: the part in which the middle of each interval lies."""
    return ((edges[:, 1:] + edges[:, :-1]) / 2).long()


def interval_of_parts(edges: Tensor, parts: int) -> Tensor:
    """(B, n + 1) edges in [0, parts] -> (B, parts) long: the interval in which the middle of each part lies."""
    middles = torch.arange(parts, device=edges.device) + 0.5
    return (edges[:, 1:-1, None] <= middles).sum(1)


def pairs_of(rows: Tensor, columns: Tensor, width: int) -> Tensor:
    """(B, n) and (B, m) numbers of rows and columns of a grid -> (B, n m): their crossings' numbers, row by row."""
    return (rows.unsqueeze(2) * width + columns.unsqueeze(1)).flatten(1)
