"""Mixed resolution: a pyramid of cells over the grid of patches, split where the order comes early.

Each cell of a level is 2 x 2 of the level below; level 0 is the grid itself, or one of larger cells. The number of
cells that are split is fixed for each level, so that all images of a batch have as many tokens of each size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..order import CollapseError, Order
from ..order.constants import constant
from ..order.sorting import stable_argsort
from ..order.spread import bayer_ranks
from .cells import coarse_grid


def pyramid_shapes(budget: int, grid: tuple[int, int], share: float) -> list[tuple[int, int]]:
    """The grids of the levels, finest first.

    Args:
        budget: Tokens.
        grid: Patches (h, w), each a power of 2 times the cells of the coarsest level.
        share: The coarsest level has at most this share of the budget in cells, if the grid can be halved so often;
            else as few as it can be, within the budget.

    Raises:
        CollapseError: Even the coarsest level has more cells than the budget.
    """
    shapes = [grid]
    while shapes[-1][0] % 2 == shapes[-1][1] % 2 == 0 and (len(shapes) == 1 or _size(shapes[-1]) > share * budget):
        shapes.append((shapes[-1][0] // 2, shapes[-1][1] // 2))
    if len(shapes) == 1 or _size(shapes[-1]) > budget:
        raise CollapseError(
            f"remainder 'mixed' needs a grid that can be halved until it has at most keep cells: {grid} can be halved "
            f"{len(shapes) - 1} times, to {_size(shapes[-1])} cells, and keep is {budget} tokens"
        )
    return shapes


def split_shapes(budget: int, grid: tuple[int, int], share: float) -> list[tuple[int, int]]:
    """Two levels on any grid, finest first: the coarser one fills the share, its cells at least 2 x 2 patches large.

    Where these are 2 x 2 patches the finer level is the grid itself; else its cells are larger than a patch.
    """
    h, w = coarse_grid(max(1, int(share * budget + 1e-6)), grid, least=2)
    return [(2 * h, 2 * w), (h, w)]


def plan_splits(budget: int, shapes: Sequence[tuple[int, int]]) -> list[int]:
    """How many cells of each level but the finest are split, level 1 first: about as many of each.

    A split makes four tokens of one. The total is the budget, or up to 2 tokens less.
    """
    left = (budget - _size(shapes[-1])) // 3
    splits, candidates = [], _size(shapes[-1])
    for level in range(len(shapes) - 1, 0, -1):
        splits.insert(0, min(candidates, -(-left // level)))
        left -= splits[0]
        candidates = 4 * splits[0]
    return splits


def count_leaves(shapes: Sequence[tuple[int, int]], splits: Sequence[int]) -> list[int]:
    """How many cells of each level are tokens, finest first."""
    candidates = [*(4 * split for split in splits), _size(shapes[-1])]
    return [candidate - split for candidate, split in zip(candidates, [0, *splits])]


def choose_leaves(order: Order, shapes: Sequence[tuple[int, int]], splits: Sequence[int]) -> list[Tensor]:
    """The cells of each level that are tokens; together they cover each patch once.

    From the coarsest level on, the candidates that come first in the order (by the mean rank of their patches) are
    split; their parts are the candidates of the next level.

    Args:
        order: Of the patches.
        shapes, splits: Of the levels.

    Returns:
        For each level, finest first, (B, n) long, ascending.
    """
    candidates = torch.ones(order.scores.shape[0], _size(shapes[-1]), dtype=torch.bool, device=order.scores.device)
    leaves, count = [], _size(shapes[-1])
    for shape, split in zip(shapes[:0:-1], splits[::-1], strict=True):
        ranks = _mean_ranks(order, shape).masked_fill(~candidates, order.num_patches)
        first = ranks.topk(split, dim=1, largest=False).indices
        chosen = torch.zeros_like(candidates).scatter(1, first, 1)  # not True: jit.trace knows no bool there
        leaves.insert(0, _numbers(candidates & ~chosen, count - split))
        candidates = _halved(chosen, shape)
        count = 4 * split
    return [_numbers(candidates, count), *leaves]


def cover_of_leaves(leaves: Sequence[Tensor], shapes: Sequence[tuple[int, int]]) -> Tensor:
    """(B, n) long: for each cell of level 0, the number of the leaf that covers it, over all levels together.

    Args:
        leaves: (B, n) of the coarser levels, finest first, from `choose_leaves`.
        shapes: Of all levels. Cells that are leaves of a level that is not given get 0.
    """
    cover = leaves[0].new_zeros(leaves[0].shape[0], _size(shapes[0]))
    start = 0
    for level, leaf in enumerate(leaves, len(shapes) - len(leaves)):
        numbers = torch.arange(start + 1, start + 1 + leaf.shape[1], device=leaf.device).expand_as(leaf)
        cells = leaf.new_zeros(leaf.shape[0], _size(shapes[level])).scatter(1, leaf, numbers)
        for shape in shapes[level:0:-1]:
            cells = _halved(cells, shape)
        cover = cover + cells
        start += leaf.shape[1]
    return (cover - 1).clamp_min(0)


def _mean_ranks(order: Order, shape: tuple[int, int]) -> Tensor:
    """(B, h w) of the cells of a level; equal ones are told apart coarse to fine."""
    means = F.adaptive_avg_pool2d(order.ranks.unflatten(1, order.grid).float().unsqueeze(1), shape).flatten(1)
    return means + constant(_tie_break, shape, device=means.device)


def _tie_break(shape: tuple[int, int]) -> Tensor:
    return bayer_ranks(shape) / (1000.0 * _size(shape))


def _size(shape: tuple[int, int]) -> int:
    return shape[0] * shape[1]


def _halved(cells: Tensor, shape: tuple[int, int]) -> Tensor:
    """Values of cells (B, n) for their four parts each, (B, 4 n)."""
    return cells.unflatten(1, shape).repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1)


def _numbers(mask: Tensor, count: int) -> Tensor:
    """(B, count) long: the places that are set, ascending; as many in each row."""
    return stable_argsort((~mask).float())[:, :count]
