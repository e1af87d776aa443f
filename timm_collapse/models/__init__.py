"""nn.Modules. Importing this registers every model with timm."""

from . import cmar, cvit  # noqa: F401  (registers the mar_*, cmar_* and cvit_* models)
from .codec import PixelCodec, VaeCodec, latent_scale, load_codec
from .collapse import collapse
from .collapsed import Collapsed
from .comae import CoMAE, alternate
from .feature_lesson import FeatureLesson
from .lesson import Lesson
from .mar import MAR
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
    "MAR",
    "PixelCodec",
    "PixelTokenizer",
    "Ranker",
    "Reconstruction",
    "Reconstructor",
    "VaeCodec",
    "VaeTokenizer",
    "alternate",
    "collapse",
    "latent_scale",
    "load_codec",
    "patchify",
    "unpatchify",
]
