"""What makes a model see fewer tokens. Importing this registers the cvit_* models with timm."""

from . import cvit  # noqa: F401  (registers the cvit_* models)
from .base import Collapsed
from .convert import collapse
from .remainder import default_orderer
from .retention import retained_count, retention_mask

__all__ = ["Collapsed", "collapse", "default_orderer", "retained_count", "retention_mask"]
