"""Data sets and the deterministic loader that the train scripts share."""

from .base import Images
from .datasets import DatasetInfo, as_images, labels_of, open_dataset
from .latents import LatentCache
from .loader import ImageLoader, StepLoader, eval_transform, train_transform
from .order_shards import check_orders, write_orders
from .ordered import OrderedImages, OrderedLatents
from .orders import OrderTable
from .sources import describe_dataset
from .units import open_units

__all__ = [
    "DatasetInfo",
    "ImageLoader",
    "Images",
    "LatentCache",
    "OrderTable",
    "OrderedImages",
    "OrderedLatents",
    "StepLoader",
    "as_images",
    "check_orders",
    "describe_dataset",
    "eval_transform",
    "labels_of",
    "open_dataset",
    "open_units",
    "train_transform",
    "write_orders",
]
