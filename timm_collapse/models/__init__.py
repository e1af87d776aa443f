"""nn.Modules. Importing this registers every model with timm."""

from . import cvit  # noqa: F401  (registers the cvit_* models)
from .collapse import collapse
from .collapsed import Collapsed
from .comae import CoMAE, alternate
from .feature_lesson import FeatureLesson
from .lesson import Lesson
from .orderer import CollapseOrder
from .ranker import Ranker
from .reconstructor import Reconstruction, Reconstructor
from .tokenizer import PixelTokenizer, VaeTokenizer, patchify, unpatchify

__all__ = [
    "CoMAE",
    "CollapseOrder",
    "Collapsed",
    "FeatureLesson",
    "Lesson",
    "PixelTokenizer",
    "Ranker",
    "Reconstruction",
    "Reconstructor",
    "VaeTokenizer",
    "alternate",
    "collapse",
    "patchify",
    "unpatchify",
]
