"""Data sets and the deterministic loader that the train scripts share."""

from .datasets import DatasetInfo, labels_of, open_dataset
from .latents import LatentCache
from .loader import StepLoader, eval_transform, train_transform
from .order_shards import check_orders, write_orders
from .orders import Indexed, OrderTable
from .units import describe_dataset, open_units

__all__ = [
    "DatasetInfo",
    "Indexed",
    "LatentCache",
    "OrderTable",
    "StepLoader",
    "check_orders",
    "describe_dataset",
    "eval_transform",
    "labels_of",
    "open_dataset",
    "open_units",
    "train_transform",
    "write_orders",
]
