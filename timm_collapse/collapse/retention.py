"""For engines that serve vision-language models: which image tokens to keep, before any of them is computed.

An engine sizes its placeholders before it has seen a picture, then asks for a mask that has exactly as many tokens (the
contract of vLLM's pruning of video tokens, and of its open proposal for images, vllm-project/vllm#45098). There the
rate is what is pruned, q = 1 - keep.
"""

from __future__ import annotations

from numbers import Integral

import torch
from torch import Tensor

from ..models.orderer import CollapseOrder
from ..order import CollapseError, check_grid, resolve_keep
from ..order.errors import describe


def retained_count(grid: tuple[int, int], keep: float | int, merge: int = 1) -> int:
    """Image tokens that are kept of each image; known without the image.

    Args:
        grid: Patch grid (h, w) of the tower.
        keep: A ratio in (0, 1] of the image tokens, or a count of at least 2; 1 keeps all.
        merge: Patches a side that become one image token, such as 2 for Qwen's 2 x 2.

    Raises:
        CollapseError: A grid that `merge` does not divide, or a budget that the image does not have.
    """
    h, w = cell_grid(grid, merge)
    return resolve_keep(keep, h * w)


def retention_mask(
    images: Tensor,
    grid: tuple[int, int],
    keep: float | int,
    merge: int = 1,
    orderer: CollapseOrder | str = "collapse_ranker_tiny_224",
) -> Tensor:
    """Which image tokens are kept.

    Args:
        images: (B, 3, H, W), normalised by the orderer's mean and std.
        grid, keep, merge: As `retained_count`.
        orderer: A `CollapseOrder`, or its name; a server loads it once.

    Returns:
        (B, h w / merge^2) bool, row by row; every row has `retained_count(grid, keep, merge)` times True.

    Raises:
        CollapseError: As `retained_count`; images or an orderer that cannot be used.
    """
    if isinstance(orderer, str):
        orderer = CollapseOrder.named(orderer)
    if not isinstance(orderer, CollapseOrder):
        raise CollapseError(f"orderer must be a CollapseOrder or a name, got {describe(orderer)}")
    h, w = cell_grid(grid, merge)
    count = retained_count(grid, keep, merge)
    kept = orderer(images, grid=(h, w), upto=count).first(count)
    return torch.zeros(kept.shape[0], h * w, dtype=torch.bool, device=kept.device).scatter(1, kept, True)


def cell_grid(grid: tuple[int, int], merge: int) -> tuple[int, int]:
    """Grid of the image tokens, (h / merge, w / merge)."""
    h, w = check_grid(grid)
    if not isinstance(merge, Integral) or merge < 1 or h % merge or w % merge:
        raise CollapseError(f"merge must be a positive int that divides the grid {(h, w)}, got {describe(merge)}")
    return h // merge, w // merge
