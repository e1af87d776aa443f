"""Saving models, with all that they need beside them, and publishing them on the Hugging Face Hub."""

from .config import HubConfig, read_config
from .publish import publish_folder, push
from .save import load_weights, save_model, save_orderer, weights_hash

__all__ = [
    "HubConfig",
    "load_weights",
    "publish_folder",
    "push",
    "read_config",
    "save_model",
    "save_orderer",
    "weights_hash",
]
