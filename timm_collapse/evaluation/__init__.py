"""Measuring orders and models."""

from .cost import count_macs, images_per_second
from .uncertainty import UncertaintyCurve, greedy_oracle, uncertainty_curve

__all__ = ["UncertaintyCurve", "count_macs", "greedy_oracle", "images_per_second", "uncertainty_curve"]
