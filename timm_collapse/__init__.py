"""Patch collapse for the model zoos people already use. Importing this registers every model with timm."""

from .collapse import collapse
from .models import CollapseOrder, CoMAE, Ranker, Reconstructor
from .order import ClassOrderBank, CollapseError, GenerationOrder, Order, pagerank

__version__ = "0.1.0"

__all__ = [
    "ClassOrderBank",
    "CoMAE",
    "CollapseError",
    "CollapseOrder",
    "GenerationOrder",
    "Order",
    "Ranker",
    "Reconstructor",
    "collapse",
    "pagerank",
]
