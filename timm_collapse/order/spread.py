"""Orders that spread: every beginning of them covers the grid evenly."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from .errors import check_grid


def bayer_ranks(grid: Sequence[int]) -> Tensor:
    """Ranks of the recursive checkerboard of ordered dithering, coarse to fine.

    The Bayer matrix of the next power of two above the longer side, cropped and ranked anew. (Stretching the matrix
    over the grid instead skips rows at uneven distances: on 37 x 37 it spreads worse than chance.)

    Args:
        grid: Rows and columns (h, w).

    Returns:
        (h * w,) long, a permutation of 0..h*w-1 in row-major layout; 0 = first. On a grid of 2^n x 2^n
        it is the Bayer matrix.

    Raises:
        CollapseError: For a wrong grid.

    Source: Bayer, "An optimum method for two-level rendition of continuous-tone pictures", ICC 1973.
    """
    height, width = check_grid(grid)
    bits = (max(height, width) - 1).bit_length()
    y, x = torch.arange(height)[:, None], torch.arange(width)[None, :]
    matrix = torch.zeros(height, width, dtype=torch.long)
    for bit in range(bits):  # the lowest bits of the position decide most: neighbours get far apart
        matrix = 4 * matrix + 2 * ((x ^ y) >> bit & 1) + (y >> bit & 1)
    return matrix.flatten().argsort().argsort()


def halton_ranks(grid: Sequence[int]) -> Tensor:
    """Ranks by the first visit of the 2-D Halton sequence (base 2 along columns, base 3 along rows, from its point 1).

    Args:
        grid: Rows and columns (h, w).

    Returns:
        (h * w,) long, a permutation of 0..h*w-1 in row-major layout; 0 = first. The sequence is continued until it has
        visited every cell.

    Raises:
        CollapseError: For a wrong grid.

    Source: Halton, "Radical-inverse quasi-random point sequence", CACM 1964.
    """
    return _halton_ranks(*check_grid(grid)).clone()


@lru_cache(maxsize=16)  # a tenth of a second on the largest grids
def _halton_ranks(height: int, width: int) -> Tensor:
    cells, points = height * width, 4 * height * width
    while True:
        index = torch.arange(1, points + 1)
        cell = _radical_inverse_cell(index, 3, height) * width + _radical_inverse_cell(index, 2, width)
        first = torch.full((cells,), points + 1).scatter_reduce_(0, cell, index, "amin")
        if (first <= points).all():
            return first.argsort().argsort()
        points *= 2


def _radical_inverse_cell(index: Tensor, base: int, cells: int) -> Tensor:
    """floor(cells * radical inverse), in integers: in floats 1/3 + 1/9 would miss the edges of cells."""
    numerator, denominator = torch.zeros_like(index), 1
    while index.any():
        numerator = numerator * base + index % base
        denominator *= base
        index = index // base
    return numerator * cells // denominator
