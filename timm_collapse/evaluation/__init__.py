"""Measuring orders and models."""

from .accuracy import accuracy_curves, image_batches, with_orderer
from .cost import Cost, costs_over_keep, count_macs, images_per_second
from .curve import KEEPS, AccuracyCurve
from .uncertainty import UncertaintyCurve, greedy_oracle, uncertainty_curve

__all__ = [
    "KEEPS",
    "AccuracyCurve",
    "Cost",
    "UncertaintyCurve",
    "accuracy_curves",
    "costs_over_keep",
    "count_macs",
    "greedy_oracle",
    "image_batches",
    "images_per_second",
    "uncertainty_curve",
    "with_orderer",
]
