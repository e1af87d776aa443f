"""Data sets and the deterministic loader that the train scripts share."""

from .datasets import DatasetInfo, labels_of, open_dataset
from .latents import LatentCache
from .loader import StepLoader, eval_transform, train_transform
from .orders import Indexed, OrderTable

__all__ = [
    "DatasetInfo",
    "Indexed",
    "LatentCache",
    "OrderTable",
    "StepLoader",
    "eval_transform",
    "labels_of",
    "open_dataset",
    "train_transform",
]
