"""The one exception of the package, and the checks of the arguments that everything shares."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral

import torch
from torch import Tensor


class CollapseError(ValueError):
    """A wrong argument: the message names it, says what was given and what is allowed."""


def values_readable(tensor: Tensor | None = None) -> bool:
    """Whether checks may look at a tensor's values: not on the meta device, nor while compiled, exported or traced."""
    meta = tensor is not None and tensor.is_meta
    return not (meta or torch.compiler.is_compiling() or torch.jit.is_tracing())


def describe(value: object) -> str:
    """What was given, for an error message: dtype and shape of a tensor, type and value of anything else."""
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)}"
    return f"{type(value).__name__} {value!r}"


def check_images(images: Tensor, channels: int | None = 3, values: bool = True) -> None:
    """Checks a batch of normalised images.

    Args:
        images: (B, channels, H, W) floating point, all values finite, no side empty; B may be 0.
        channels: None: any number.
        values: Also look at the values, which waits for a GPU; never done while a graph is made of the pass.

    Raises:
        CollapseError: For anything else; a NaN or infinite image is named by its index in the batch.
    """
    if not isinstance(images, Tensor) or images.ndim != 4 or channels not in (None, images.shape[1]):
        raise CollapseError(
            f"images must be a float tensor of shape (B, {channels or 'C'}, H, W), got {describe(images)}"
        )
    if not images.is_floating_point():
        raise CollapseError(
            f"images must be floating point, got {describe(images)}: normalise them first, "
            "(images.float() / 255 - mean) / std"
        )
    if 0 in images.shape[1:]:
        raise CollapseError(f"images must not be empty, got {describe(images)}")
    if values and values_readable(images):
        finite = images.isfinite().flatten(1).all(dim=1)
        if not finite.all():
            bad = (~finite).nonzero().flatten().tolist()
            raise CollapseError(f"images must be finite, got NaN or inf in the images at index {_listed(bad)}")


def check_grid(grid: Sequence[int], num_patches: int | None = None) -> tuple[int, int]:
    """Checks a grid of patches.

    Args:
        grid: Rows and columns of patches (h, w), both at least 1.
        num_patches: The number of patches that h * w must equal, where it is known.

    Returns:
        The grid as a tuple of two ints.

    Raises:
        CollapseError: Where grid is not two positive ints or does not hold num_patches patches.
    """
    if (
        not isinstance(grid, Sequence)
        or isinstance(grid, str)
        or len(grid) != 2
        or not all(isinstance(side, Integral) and not isinstance(side, bool) and side >= 1 for side in grid)
    ):
        raise CollapseError(f"grid must be two positive ints (rows, columns), got {describe(grid)}")
    height, width = int(grid[0]), int(grid[1])
    if num_patches is not None and height * width != num_patches:
        raise CollapseError(f"grid ({height}, {width}) has {height * width} patches, but there are {num_patches}")
    return height, width


def _listed(indices: list[int], shown: int = 8) -> str:
    """The first few indices of a list that may be long."""
    more = f" and {len(indices) - shown} more" if len(indices) > shown else ""
    return ", ".join(map(str, indices[:shown])) + more
