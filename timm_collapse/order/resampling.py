"""From a grid to a finer one: see `Order.resample`."""

from __future__ import annotations

import math
from numbers import Real

import torch
from torch import Tensor

from .errors import CollapseError, describe


def check_spread(spread: float) -> None:
    """Raises CollapseError unless a spread is in [0, 1], see `Order.resample`."""
    if isinstance(spread, bool) or not isinstance(spread, Real) or not 0 <= spread <= 1:
        raise CollapseError(f"spread must be in [0, 1], got {describe(spread)}")


def places_before_spreading(places: int, grid: tuple[int, int], old: tuple[int, int], spread: float) -> int:
    """How many first places of an order on the grid `old` are enough for the first `places` on a finer `grid`.

    Patches come by (1 - spread) x + spread y, with x and y in [0, 1): the line of those that come last cuts a triangle
    or, above the diagonal, a trapezium from the unit square, whose area is the share of the patches. Where old patches
    have different numbers of parts, all are taken to have the fewest.
    """
    old_patches = old[0] * old[1]
    share, needed = places / (old_patches * (grid[0] // old[0]) * (grid[1] // old[1])), 1.0
    if spread <= 0.5:
        slope = spread / (1 - spread)
        needed = share + slope / 2 if share >= slope / 2 else math.sqrt(2 * slope * share)
    elif share <= (1 - spread) / spread / 2:
        needed = math.sqrt(2 * spread / (1 - spread) * share)
    return min(old_patches, math.ceil(needed * old_patches))


def refined_ranks(ranks: Tensor, old: tuple[int, int], grid: tuple[int, int], bayer: Tensor, spread: float) -> Tensor:
    """What the patches of a finer grid are sorted by: the rank of their old patch and their place in it.

    Args:
        ranks: (B, old N).
        old, grid: The two grids (h, w).
        bayer: (N,), Bayer ranks of the finer grid: the places inside an old patch.
        spread: In [0, 1]; 0: (B, N) are the old ranks, so that all parts of a patch are equal.
    """
    values = ranks.unflatten(1, old)
    rows, columns = (_parents(new, before, ranks.device) for new, before in zip(grid, old, strict=True))
    values = values[:, rows[:, None], columns]
    if spread:
        place = _place_in_parent(rows[:, None] * old[1] + columns, bayer.to(ranks.device))
        values = (1 - spread) / ranks.shape[1] * values.double() + spread * place
        values = (values * 2**30).round()  # equal sums are equal
    return values.flatten(1)


def _place_in_parent(parents: Tensor, ranks: Tensor) -> Tensor:
    """(h, w) in [0, 1): where each patch comes among those of the same parent, parents (h, w), by its rank (h w,)."""
    flat = parents.flatten()
    by_parent = (flat * len(flat) + ranks).argsort()
    counts = flat.bincount()
    starts = counts.cumsum(0) - counts
    place = torch.empty(len(flat), dtype=torch.float64, device=flat.device)
    place[by_parent] = torch.arange(len(flat), device=flat.device, dtype=place.dtype)
    return ((place - starts[flat]) / counts[flat]).view_as(parents)


def _parents(new: int, old: int, device: torch.device) -> Tensor:
    """(new,) long: which of the `old` patches of an axis the centre of each of the `new` patches lies in."""
    return (2 * torch.arange(new, device=device) + 1) * old // (2 * new)
