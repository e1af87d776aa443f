"""Patch collapse for the model zoos people already use. Importing this registers every model with timm."""

from .models import CollapseOrder, CoMAE, Ranker, Reconstructor, collapse
from .order import CollapseError, Order, pagerank

__version__ = "0.1.0"

__all__ = ["CoMAE", "CollapseError", "CollapseOrder", "Order", "Ranker", "Reconstructor", "collapse", "pagerank"]
