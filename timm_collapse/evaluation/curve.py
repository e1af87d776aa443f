"""The accuracy-over-keep curve: its counts, its area and its knee."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..order import CollapseError, check_keeps

KEEPS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.22, 0.15, 0.1, 0.05, 0.02, 0.01)
"""Keep ratios that are measured by default: 0% to 99% of the patches masked."""


@dataclass
class AccuracyCurve:
    """Accuracy of one model at each keep ratio, as exact counts.

    Attributes:
        keeps: K distinct keep ratios in (0, 1], descending. The share of masked patches is 1 - keep, also on small
            grids whose smallest ratios come to the same number of patches.
        hits1, hits5: K numbers of images whose label is the best, or among the five best (all, where a model has fewer
            than five classes).
        images: Number of images, at least 1.

    Raises:
        CollapseError: Keeps that are no ratios or do not descend, or counts that are not K in [0, images].
    """

    keeps: list[float]
    hits1: list[int]
    hits5: list[int]
    images: int

    def __post_init__(self):
        if list(self.keeps) != check_keeps(self.keeps):
            raise CollapseError(f"keeps must be distinct and descend, got {self.keeps}")
        if self.images < 1:
            raise CollapseError(f"images must be at least 1, got {self.images}")
        for name, hits in (("hits1", self.hits1), ("hits5", self.hits5)):
            if len(hits) != len(self.keeps) or not all(0 <= count <= self.images for count in hits):
                raise CollapseError(
                    f"{name} must be {len(self.keeps)} counts in [0, {self.images}], one for each keep, got {hits}"
                )

    @property
    def top1(self) -> list[float]:
        """Top-1 accuracy at each keep, in per cent."""
        return [100 * hits / self.images for hits in self.hits1]

    @property
    def top5(self) -> list[float]:
        """Top-5 accuracy at each keep, in per cent."""
        return [100 * hits / self.images for hits in self.hits5]

    @property
    def top1_error(self) -> list[float]:
        """Standard error of each top-1 accuracy (binomial, as the images are a sample), in points."""
        return [_standard_error(hits, self.images) for hits in self.hits1]

    @property
    def top5_error(self) -> list[float]:
        """Standard error of each top-5 accuracy, in points."""
        return [_standard_error(hits, self.images) for hits in self.hits5]

    @property
    def auc(self) -> float | None:
        """Area under top-1 over the masked share, see `area_under_curve`; None for a single keep."""
        return area_under_curve(self.keeps, self.top1)

    @property
    def knee(self) -> float | None:
        """Keep ratio at the knee of top-1, see `find_knee`; None where there is none."""
        return find_knee(self.keeps, self.top1)

    def at(self, keep: float) -> int:
        """Index of a keep ratio; CollapseError where it was not measured."""
        found = [i for i, each in enumerate(self.keeps) if math.isclose(each, keep)]
        if not found:
            raise CollapseError(f"keep: {keep} was not measured, only {self.keeps}")
        return found[0]

    def to_dict(self) -> dict[str, Any]:
        """Everything, JSON-serialisable; `masked` is the range that `auc` is the mean over."""
        names = ("keeps", "hits1", "hits5", "images", "top1", "top5", "top1_error", "top5_error", "auc", "knee")
        masked = [round(1 - keep, 12) for keep in (self.keeps[0], self.keeps[-1])]
        return {**{name: getattr(self, name) for name in names}, "masked": masked}


def area_under_curve(keeps: Sequence[float], accuracy: Sequence[float]) -> float | None:
    """Mean accuracy over the measured range of masked shares.

    The integral over the masked share 1 - keep by trapezoids, divided by the length of the range (0.99 for KEEPS): a
    constant accuracy is its own area. The keeps need no even spacing.

    Args:
        keeps: K distinct ratios in (0, 1], descending.
        accuracy: K accuracies, in any unit.

    Returns:
        The area in the unit of the accuracies; None for a single point.
    """
    if len(keeps) < 2:
        return None
    masked, values = 1 - torch.tensor(keeps, dtype=torch.float64), torch.tensor(accuracy, dtype=torch.float64)
    return float(torch.trapezoid(values, masked) / (masked[-1] - masked[0]))


def find_knee(keeps: Sequence[float], accuracy: Sequence[float]) -> float | None:
    """Keep ratio after which accuracy falls off: Kneedle (Satopaa et al. 2011) on accuracy over the masked share.

    Args:
        keeps: K distinct ratios in (0, 1], descending.
        accuracy: K accuracies, in any unit.

    Returns:
        One of the keeps; None for less than three points, a curve that does not fall, or one without a knee between
        its ends.
    """
    if len(keeps) < 3 or not accuracy[-1] < accuracy[0]:
        return None
    from kneed import KneeLocator

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "no knee found" is an answer
        locator = KneeLocator(1 - np.asarray(keeps, dtype=float), accuracy, curve="concave", direction="decreasing")
    if locator.knee is None:
        return None
    index = int(np.argmin(np.abs(locator.x - locator.knee)))
    return float(keeps[index]) if 0 < index < len(keeps) - 1 else None


def _standard_error(hits: int, images: int) -> float:
    share = hits / images
    return 100 * math.sqrt(share * (1 - share) / images)
