"""nn.Modules. Importing this registers every model with timm."""

from .collapse import collapse
from .collapsed import Collapsed
from .comae import CoMAE, alternate
from .lesson import Lesson
from .orderer import CollapseOrder
from .ranker import Ranker
from .reconstructor import Reconstruction, Reconstructor
from .tokenizer import PixelTokenizer, VaeTokenizer, patchify, unpatchify

__all__ = [
    "CoMAE",
    "CollapseOrder",
    "Collapsed",
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
