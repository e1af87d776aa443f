"""Where patches lie on a grid from the point of view of one of them, the target of a CoMAE."""

from __future__ import annotations

import torch
from torch import Tensor

from .transformer import gather_tokens


def others(targets: Tensor, num_patches: int) -> Tensor:
    """(B, M) -> (B, M, N - 1): every position but the target, ascending."""
    rest = torch.arange(num_patches - 1, device=targets.device)
    return rest + (rest >= targets.unsqueeze(-1))


def offset_index(targets: Tensor, index: Tensor, grid: tuple[int, int]) -> Tensor:
    """Number of each relative offset (rows, columns), of (2 h - 1)(2 w - 1).

    Args:
        targets: (B, M) long.
        index: (B M, n) long: positions.
        grid: (h, w).

    Returns:
        (B M, n) long.
    """
    h, w = grid
    target = targets.flatten().unsqueeze(1)
    return (index // w - target // w + h - 1) * (2 * w - 1) + (index % w - target % w + w - 1)


def close(targets: Tensor, grid: tuple[int, int], radius: int) -> Tensor:
    """(B, M) -> (B, M, N - 1): which of the `others` lie within a radius, in patches, rows and columns each."""
    h, w = grid
    index, target = others(targets, h * w), targets.unsqueeze(-1)
    return ((index // w - target // w).abs() <= radius) & ((index % w - target % w).abs() <= radius)


def neighbourhood(seen: Tensor, targets: Tensor, grid: tuple[int, int], radius: int) -> Tensor:
    """Tokens around each target, row by row, without it; 0 beyond the border.

    Args:
        seen: (B M, N - 1, D): the tokens of `others`.
        targets: (B, M) long.
        grid: (h, w).
        radius: In patches.

    Returns:
        (B M, ((2 radius + 1)^2 - 1) D).
    """
    h, w = grid
    target = targets.flatten().unsqueeze(1)
    reach = torch.arange(-radius, radius + 1, device=targets.device)
    dy, dx = (t.flatten() for t in torch.meshgrid(reach, reach, indexing="ij"))
    keep = (dy != 0) | (dx != 0)
    row, col = target // w + dy[keep], target % w + dx[keep]
    inside = (row >= 0) & (row < h) & (col >= 0) & (col < w)
    position = (row * w + col).clamp(0, h * w - 1)
    position = (position - (position > target).long()).clamp(0, h * w - 2)  # the target is not in `seen`
    return (gather_tokens(seen, position) * inside.unsqueeze(-1)).flatten(1)
