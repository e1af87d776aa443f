"""The registered generators: `mar_*` as published, and `cmar_*`, which bring an order bank along."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

from timm.models import PretrainedCfg, generate_default_cfgs

from ..hub.download import find_beside
from ..hub.files import BANK_FILE
from .mar import MAR
from .registry import build, pixel_cfg, register

_LARGE = dict(encoder_embed_dim=1024, encoder_depth=16, encoder_num_heads=16, decoder_embed_dim=1024, decoder_depth=16,
              decoder_num_heads=16, diffloss_d=8, diffloss_w=1280)  # fmt: skip
_HUGE = dict(encoder_embed_dim=1280, encoder_depth=20, encoder_num_heads=16, decoder_embed_dim=1280, decoder_depth=20,
             decoder_num_heads=16, diffloss_d=12, diffloss_w=1536)  # fmt: skip
_PIXELS = dict(vae="pixels", latent_bound=2.0, vae_stride=1, vae_embed_dim=3, attn_dropout=0.0, proj_dropout=0.0,
               buffer_size=4, num_sampling_steps=50)  # fmt: skip
_TINY = dict(
    encoder_embed_dim=192,
    encoder_depth=3,
    encoder_num_heads=6,
    decoder_embed_dim=192,
    decoder_depth=3,
    decoder_num_heads=6,
    diffloss_d=3,
    diffloss_w=192,
    diffusion_batch_mul=2,
    **_PIXELS,
)
_MINI = dict(_TINY, encoder_embed_dim=96, encoder_depth=2, encoder_num_heads=3, decoder_embed_dim=96, decoder_depth=2,
             decoder_num_heads=3, diffloss_d=2, diffloss_w=128)  # fmt: skip

_KL16 = {"img_size": 256, "mean": (0.5,) * 3, "std": (0.5,) * 3, "num_classes": 1000}
_PIXEL = {"mean": (0.5,) * 3, "std": (0.25,) * 3}


class Size(NamedTuple):
    """One architecture, registered as `mar_SIZE` and `cmar_SIZE`.

    Attributes:
        shape: Arguments of `MAR`.
        cfg: Of timm's pretrained configuration.
        about: What it is.
        tag: Of the bundled weights of the `cmar_*` model; "" for none.
    """

    shape: dict[str, Any]
    cfg: dict[str, Any]
    about: str
    tag: str = ""


SIZES = {
    "base": Size(
        {}, _KL16, "MAR-B: 12 + 12 blocks of width 768, head 6 x 1024, 207.9 M parameters; 256 px through KL-16."
    ),
    "large": Size(_LARGE, _KL16, "MAR-L: 16 + 16 blocks of width 1024, head 8 x 1280, 478.3 M parameters."),
    "huge": Size(_HUGE, _KL16, "MAR-H: 20 + 20 blocks of width 1280, head 12 x 1536, 942.4 M parameters."),
    "tiny_patch8_64": Size(
        dict(_TINY, img_size=64, patch_size=8, class_num=100),
        {"img_size": 64, "num_classes": 100, **_PIXEL},
        "64 px pixels as 8 x 8 tokens of 8 px.",
    ),
    "tiny_patch4_32": Size(
        dict(_TINY, img_size=32, patch_size=4, class_num=10),
        {"img_size": 32, "num_classes": 10, **_PIXEL},
        "32 px pixels as 8 x 8 tokens of 4 px.",
        "cifar10",
    ),
    "mini_patch1_8": Size(
        dict(_MINI, img_size=8, patch_size=1, class_num=10),
        {"img_size": 8, "num_classes": 10, **_PIXEL},
        "8 px digits, a token a pixel.",
        "digits",
    ),
}


def _default_cfgs() -> dict[str, Any]:
    cfgs = {f"mar_{name}": pixel_cfg(**size.cfg) for name, size in SIZES.items()}
    for name, size in SIZES.items():
        tagged = f"cmar_{name}.{size.tag}" if size.tag else ""
        cfgs[tagged or f"cmar_{name}"] = pixel_cfg(tagged, **size.cfg)
    return generate_default_cfgs(cfgs)


default_cfgs = _default_cfgs()


def _mar(shape: dict[str, Any], variant: str, pretrained: bool, kwargs: dict[str, Any]) -> MAR:
    """timm's num_classes is the reference's class_num; the order bank is loaded from beside the weights."""
    if (num_classes := kwargs.pop("num_classes", None)) is not None:
        kwargs.setdefault("class_num", num_classes)
    model = build(MAR, variant, pretrained, shape, kwargs)
    model.num_classes = 0 if model.class_emb is None else model.class_emb.num_embeddings
    if pretrained and (bank := find_beside(PretrainedCfg(**model.pretrained_cfg), BANK_FILE, kwargs.get("cache_dir"))):
        model.load_bank(bank)
    return model


for _name, _size in SIZES.items():
    register(f"mar_{_name}", partial(_mar, _size.shape), __name__, _size.about)
    register(
        f"cmar_{_name}",
        partial(_mar, _size.shape),
        __name__,
        f"`mar_{_name}` along collapse orders: its order bank comes with the weights.",
    )
