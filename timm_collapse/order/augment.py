"""Orders for training: a model that sees only one order of an image misses the augmentation that random drop gives."""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import CollapseError, describe
from .order import Order


def jitter_order(order: Order, temperature: float, uniform: Tensor) -> Order:
    """Plackett-Luce sample around an order.

    Patch n is drawn next, among those that are left, with probability proportional to exp(-rank_n / (temperature N)):
    0 keeps the order, about .1 moves patches within a tenth of the places, large values approach random order.

    Args:
        order: Orders of B images.
        temperature: At least 0.
        uniform: (B, N) in [0, 1): the randomness (Gumbel noise is made of it).

    Returns:
        The sampled orders.

    Raises:
        CollapseError: A negative temperature, or randomness of another shape.
    """
    if not temperature >= 0:
        raise CollapseError(f"temperature must be at least 0, got {temperature!r}")
    _check_uniform(uniform, (len(order), order.num_patches))
    if temperature == 0:
        return order
    gumbel = -torch.log(-torch.log(uniform.clamp(1e-7, 1 - 1e-7)))
    return Order.unchecked(gumbel - order.ranks / (temperature * order.num_patches), order.grid)


def mix_random(order: Order, share: float, uniform: Tensor) -> Order:
    """A random order in the place of some of the orders.

    Args:
        order: Orders of B images.
        share: Expected share of the images, in [0, 1].
        uniform: (B, N + 1) in [0, 1): the first N make the random order, the last one decides.

    Raises:
        CollapseError: A share out of range, or randomness of another shape.
    """
    if not 0 <= share <= 1:
        raise CollapseError(f"share must be in [0, 1], got {share!r}")
    _check_uniform(uniform, (len(order), order.num_patches + 1))
    if share == 0:
        return order
    replace = uniform[:, -1:] < share
    return Order.unchecked(torch.where(replace, uniform[:, :-1], -order.ranks.to(uniform.dtype)), order.grid)


def _check_uniform(uniform: Tensor, shape: tuple[int, int]) -> None:
    if tuple(uniform.shape) != shape:
        raise CollapseError(f"uniform must have shape {shape}, got {describe(uniform)}")
