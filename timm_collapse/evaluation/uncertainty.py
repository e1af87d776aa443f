"""The paper's objective, measured: what a judge that no orderer saw still does not know after the first k patches."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..models.reconstructor import Reconstructor
from ..order import CollapseError, Order


@dataclass
class UncertaintyCurve:
    """Means over images, at each number of visible patches.

    Attributes:
        visible: (K,) numbers of visible patches, ascending from 0.
        error: (K,) mean L1 error of the hidden patches (data standard deviations).
        entropy: (K,) mean entropy of the hidden patches, nats a feature, under the judge's Laplace likelihood: what it
            believes.
        cross_entropy: (K,) mean negative log-likelihood of the hidden patches, nats a feature, under the same: what
            they really cost. The two are equal where the judge's belief is right, as for sets that do not depend on
            the image. It takes every visible set for such a sample: where an order showed what is hard first, it
            believes that the rest is as hard, and where it showed what is easy, that all is easy.
        num_patches: N.
        per_image: (K, images) errors, for paired comparisons.
    """

    visible: Tensor
    error: Tensor
    entropy: Tensor
    cross_entropy: Tensor
    num_patches: int
    per_image: Tensor

    @property
    def area(self) -> float:
        """Mean over k = 0 ... N - 1 of the mean error of the hidden patches (trapezoids between measured k)."""
        return _area(self.visible, self.error)

    @property
    def sum_area(self) -> float:
        """Mean over k of the summed error of the hidden patches, a patch of the image: early k weigh more."""
        return self._summed(self.error)

    @property
    def entropy_area(self) -> float:
        """Mean over k of the summed entropy of the hidden patches a patch of the image (the paper's Definition 1)."""
        return self._summed(self.entropy)

    @property
    def cross_entropy_area(self) -> float:
        """The same of the cross-entropy."""
        return self._summed(self.cross_entropy)

    def _summed(self, means: Tensor) -> float:
        return _area(self.visible, means * (1.0 - self.visible / self.num_patches))

    @property
    def areas(self) -> Tensor:
        """Area of each image (images,)."""
        return torch.trapezoid(self.per_image, self.visible.float(), dim=0) / float(self.visible[-1])

    def at(self, k: int) -> float:
        """Error at k visible patches; k must have been measured."""
        found = (self.visible == k).nonzero()
        if not len(found):
            raise CollapseError(f"k: {k} was not measured, only {self.visible.tolist()}")
        return float(self.error[found[0, 0]])


def _area(x: Tensor, y: Tensor) -> float:
    return float(torch.trapezoid(y, x.float()) / float(x[-1]))


def visible_counts(num_patches: int, points: int = 0) -> list[int]:
    """Numbers of visible patches to measure: all from 0 to N - 1, or about `points`, dense at the start.

    6, 14 and 32 of 64 (and the same shares of other N) are always among them.
    """
    if points < 2 or points >= num_patches:
        return list(range(num_patches))
    spread = {round((num_patches - 1) * (i / (points - 1)) ** 1.5) for i in range(points)}
    return sorted(spread | {round(num_patches * k / 64) for k in (6, 14, 32)} | {0, num_patches - 1})


@torch.no_grad()
def uncertainty_curve(
    judge: Reconstructor, images: Tensor, order: Order, visible: list[int] | None = None, batch_size: int = 64
) -> UncertaintyCurve:
    """Uncertainty after each prefix of an order.

    Args:
        judge: Reconstructor trained on random subsets of other images.
        images: (B, C, H, W) in the judge's normalisation.
        order: B orders on the judge's grid.
        visible: Numbers of visible patches; None for all from 0 to N - 1.
        batch_size: Images in one pass of the judge.

    Raises:
        CollapseError: The order does not fit the images or the judge's grid.
    """
    grid = judge.tokenizer.grid(images.shape[-2:])
    if order.grid != grid or len(order) != len(images):
        raise CollapseError(
            f"order: expected {len(images)} orders on grid {grid}, got {len(order)} on grid {order.grid}"
        )
    n = order.num_patches
    visible = list(range(n)) if visible is None else visible
    if not all(0 <= k < n for k in visible) or sorted(set(visible)) != list(visible):
        raise CollapseError(f"visible: must ascend within [0, {n - 1}], got {visible}")
    errors, entropies, costs = torch.empty(3, len(visible), len(images))
    for start in range(0, len(images), batch_size):
        part = slice(start, start + batch_size)
        tokens, indices = judge.tokenizer(images[part]), order.indices[part]
        for i, k in enumerate(visible):
            out = judge.reconstruct(tokens, indices[:, :k].sort(1).values, grid)
            hidden = indices[:, k:]
            error = (out.tokens - tokens).abs().mean(-1).gather(1, hidden)
            log_scale = out.log_scale.gather(1, hidden)
            errors[i, part] = error.mean(1).cpu()
            # of a Laplace distribution of scale b: 1 + log 2b, and error / b + log 2b
            entropies[i, part] = (1 + math.log(2) + log_scale).mean(1).cpu()
            costs[i, part] = (error * (-log_scale).exp() + math.log(2) + log_scale).mean(1).cpu()
    return UncertaintyCurve(
        torch.tensor(visible), errors.mean(1), entropies.mean(1), costs.mean(1), num_patches=n, per_image=errors
    )


@torch.no_grad()
def greedy_oracle(judge: Reconstructor, images: Tensor, upto: int | None = None) -> Order:
    """The order that an oracle would choose: each next patch is the one after which the judge's true error is least.

    It looks at the hidden patches' true errors, so it bounds from below what greedy orders can reach; N passes of the
    judge a step.

    Args:
        judge: Reconstructor.
        images: (B, C, H, W) in its normalisation; one image at a time is processed.
        upto: Places to fill greedily; the rest follows in row-major order.
    """
    grid = judge.tokenizer.grid(images.shape[-2:])
    n = grid[0] * grid[1]
    rows = []
    for image in images.split(1):
        tokens = judge.tokenizer(image)
        chosen: list[int] = []
        for _ in range(n if upto is None else upto):
            left = [j for j in range(n) if j not in chosen]
            sets = torch.tensor([sorted([*chosen, j]) for j in left], device=images.device)
            left_error = judge.errors(tokens.expand(len(left), -1, -1), sets, grid).sum(1)
            chosen.append(left[int(left_error.argmin())])
        rows.append([*chosen, *(j for j in range(n) if j not in chosen)])
    return Order.from_indices(torch.tensor(rows, device=images.device), grid)
