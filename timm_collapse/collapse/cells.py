"""Geometry of cells of patches that cover their grid; all of it linear in the number of patches."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ..order.constants import constant


def coarse_grid(budget: int, grid: tuple[int, int], least: int = 1) -> tuple[int, int] | None:
    """The grid (h, w) of coarse tokens that fills a budget best: at most `budget` cells, nearly the image's aspect.

    Args:
        budget: Cells.
        grid: Patches (h, w).
        least: Cells have at least so many patches a side, if there are as many.

    Returns:
        The grid with most cells whose cells are at most 1.5 times as long as wide (or the reverse, relative to a
        patch), the squarest of these; None for a budget under 1.
    """
    # a graph that is compiled keeps what is found here; its compiler warns of caches
    return (_search if torch.compiler.is_compiling() else _search_once)(budget, grid, least)


def _search(budget: int, grid: tuple[int, int], least: int) -> tuple[int, int] | None:
    best, most = None, [max(1, side // least) for side in grid]
    for h in range(1, min(most[0], budget) + 1):
        for w in range(1, min(most[1], budget // h) + 1):
            stretch = (grid[0] / h) / (grid[1] / w)
            stretch = max(stretch, 1 / stretch)
            if stretch <= 1.5 or h * w == 1:
                best = max(best or (0,), (h * w, -stretch, (h, w)))
    return best[-1] if best else None


_search_once = lru_cache(maxsize=256)(_search)


def axis_weights(new: int, old: int) -> Tensor:
    """(new, old): the share of each of `old` patches of an axis in each of `new` cells, by length; rows sum to 1."""
    return interval_shares(torch.arange(new + 1, dtype=torch.float64).unsqueeze(0) * old / new, old)[0].float()


def interval_shares(edges: Tensor, parts: int) -> Tensor:
    """(B, n + 1) ascending edges in [0, parts] -> (B, n, parts): what each part has of each interval; rows sum to 1."""
    part = torch.arange(parts, dtype=edges.dtype, device=edges.device)
    lower, upper = edges[:, :-1, None], edges[:, 1:, None]
    return (torch.minimum(upper, part + 1) - torch.maximum(lower, part)).clamp_min(0) / (upper - lower)


def mean_of_cells(values: Tensor, grid: tuple[int, int], cells: tuple[int, int]) -> Tensor:
    """Means over the cells, by area: (B, N, D) -> (B, c, D)."""
    return weighted_axes(values, grid, _axes(values, grid, cells))


def weighted_axes(values: Tensor, grid: tuple[int, int], axes: tuple[Tensor, Tensor]) -> Tensor:
    """Sums of values on a grid over its rows and columns.

    Args:
        values: (B or 1, N, D).
        grid: (H, W), N in all.
        axes: Weights of the rows ([B,] h, H), and of the columns ([B,] w, W).

    Returns:
        (B, h w, D).
    """
    rows, columns = axes
    values = (rows @ values.unflatten(1, grid).flatten(2)).unflatten(2, (grid[1], -1))
    return (columns.unsqueeze(-3) @ values).flatten(1, 2)


def sum_of_cells(values: Tensor, grid: tuple[int, int], cells: tuple[int, int]) -> Tensor:
    """For each patch the sum of its cells' values, by the shares of it that they have: (B, c, D) -> (B, N, D)."""
    axes = zip(_axes(values, grid, cells), cells, grid, strict=True)
    return weighted_axes(values, cells, tuple(axis.mT * (old / new) for axis, new, old in axes))


def _axes(like: Tensor, grid: tuple[int, int], cells: tuple[int, int]) -> tuple[Tensor, ...]:
    """The weights of both axes, on the device and in the type of a tensor."""
    shapes = zip(cells, grid, strict=True)
    return tuple(constant(axis_weights, new, old, device=like.device).to(like.dtype) for new, old in shapes)


def cell_of_patches(grid: tuple[int, int], cells: tuple[int, int]) -> Tensor:
    """(1, N) long: the cell that has most of each patch, the first of several."""
    row, column = (axis_weights(new, old).argmax(0) for new, old in zip(cells, grid, strict=True))
    return (row[:, None] * cells[1] + column).reshape(1, -1)


def cell_centres(grid: tuple[int, int], cells: tuple[int, int]) -> Tensor:
    """(1, c) long: the patch in which the centre of each coarse cell lies."""
    rows = (2 * torch.arange(cells[0]) + 1) * grid[0] // (2 * cells[0])
    columns = (2 * torch.arange(cells[1]) + 1) * grid[1] // (2 * cells[1])
    return (rows[:, None] * grid[1] + columns).reshape(1, -1)


def patches_of_cells(cells: Tensor, grid: tuple[int, int], side: int) -> Tensor:
    """The patches of some cells of side x side patches each.

    Args:
        cells: (B, k) long.
        grid: Cells (h, w).
        side: Patches on a side of a cell.

    Returns:
        (B, k side^2) long, numbers on the grid of patches: one cell after the other, each row by row.
    """
    width, steps = grid[1] * side, torch.arange(side, device=cells.device)
    corners = cells // grid[1] * (side * width) + cells % grid[1] * side
    return (corners.unsqueeze(2) + (steps.unsqueeze(1) * width + steps).flatten()).flatten(1)
