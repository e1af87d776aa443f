"""nn.Modules, and what runs them alone: `generate` of MAR, drafts, finer graphs of a CoMAE.

Importing this registers the orderers and generators with timm.
"""

from . import cmar, comae_sizes  # noqa: F401  (they register the mar_*, cmar_* and comae_* models)
from .codec import PixelCodec, VaeCodec, load_codec
from .comae import CoMAE
from .mar import MAR
from .orderer import CollapseOrder
from .ranker import Ranker
from .reconstructor import Reconstruction, Reconstructor
from .tokenizer import PixelTokenizer, VaeTokenizer, patchify, unpatchify

__all__ = [
    "CoMAE",
    "CollapseOrder",
    "MAR",
    "PixelCodec",
    "PixelTokenizer",
    "Ranker",
    "Reconstruction",
    "Reconstructor",
    "VaeCodec",
    "VaeTokenizer",
    "load_codec",
    "patchify",
    "unpatchify",
]
