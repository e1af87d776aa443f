"""Weights of patches: by how much the uncertainty of each counts, such as its relevance to a question."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import CollapseError, describe, values_readable


def patch_weights(
    weights: Tensor, batch: int, grid: tuple[int, int], own: tuple[int, int] | None = None, values: bool = True
) -> Tensor:
    """Checked weights of patches, on an orderer's own grid; only their ratios inside an image matter.

    Args:
        weights: (B, N) of the patches of `grid`, or a map (B, H, W) of any resolution, such as a mask of the pixels, of
            which each patch has the mean: non-negative, finite, not all zero for an image; numbers or bools.
        batch: B.
        grid: Patches (h, w), N = h w.
        own: The grid of the result; None: `grid`.
        values: Also look at the values, which waits for a GPU.

    Returns:
        (B, patches of `own`) float32, divided by the largest weight of the image.

    Raises:
        CollapseError: For anything else.
    """
    h, w = grid
    known = isinstance(weights, Tensor) and not weights.is_complex() and weights.shape[:1] == (batch,)
    if not known or not (tuple(weights.shape[1:]) == (h * w,) or weights.ndim == 3 and 0 not in weights.shape[1:]):
        raise CollapseError(
            f"weights must be of shape ({batch}, {h * w}), for the patches of {grid}, or a map ({batch}, H, W), "
            f"got {describe(weights)}"
        )
    maps = weights.detach().to(torch.promote_types(weights.dtype, torch.float32))
    if values and values_readable(maps):
        if not (maps.isfinite().all() and (maps >= 0).all()):
            raise CollapseError(
                f"weights must be non-negative and finite, got values in [{maps.min().item():.4g}, "
                f"{maps.max().item():.4g}]"
            )
        if (empty := maps.flatten(1).amax(1) == 0).any():
            raise CollapseError(
                f"weights must not be all zero, got only zeros for the image at index {int(empty.nonzero()[0])}"
            )
    maps = maps.view(batch, 1, *((h, w) if maps.ndim == 2 else maps.shape[1:]))
    maps = (maps / maps.amax((2, 3), keepdim=True)).float()
    return F.adaptive_avg_pool2d(maps, own or grid).flatten(1)
