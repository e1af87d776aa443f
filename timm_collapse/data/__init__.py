"""Data sets and the deterministic loader that the train scripts share."""

from .datasets import DatasetInfo, open_dataset
from .loader import StepLoader, eval_transform, train_transform

__all__ = ["DatasetInfo", "StepLoader", "eval_transform", "open_dataset", "train_transform"]
