"""The registered generators: `mar_*` as published, and `cmar_*`, which bring an order bank along."""

from __future__ import annotations

from typing import Any

from timm.models import PretrainedCfg, generate_default_cfgs, register_model

from ..hub.download import find_beside
from ..hub.files import BANK_FILE
from .mar import MAR
from .registry import build, pixel_cfg

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


_KL16_SIZES = ("base", "large", "huge")

default_cfgs = generate_default_cfgs(
    {
        **{f"{kind}_{size}": pixel_cfg(**_KL16) for kind in ("mar", "cmar") for size in _KL16_SIZES},
        "mar_tiny_patch8_64": pixel_cfg(img_size=64, num_classes=100, **_PIXEL),
        "cmar_tiny_patch8_64": pixel_cfg(img_size=64, num_classes=100, **_PIXEL),
        "mar_tiny_patch4_32": pixel_cfg(img_size=32, num_classes=10, **_PIXEL),
        "cmar_tiny_patch4_32.cifar10": pixel_cfg("cmar_tiny_patch4_32.cifar10", 32, num_classes=10, **_PIXEL),
        "mar_mini_patch1_8": pixel_cfg(img_size=8, num_classes=10, **_PIXEL),
        "cmar_mini_patch1_8.digits": pixel_cfg("cmar_mini_patch1_8.digits", 8, num_classes=10, **_PIXEL),
    }
)


def _mar(variant: str, pretrained: bool, defaults: dict[str, Any], kwargs: dict[str, Any]) -> MAR:
    """timm's num_classes is the reference's class_num; the order bank is loaded from beside the weights."""
    if (num_classes := kwargs.pop("num_classes", None)) is not None:
        kwargs.setdefault("class_num", num_classes)
    model = build(MAR, variant, pretrained, defaults, kwargs)
    model.num_classes = 0 if model.class_emb is None else model.class_emb.num_embeddings
    if pretrained and (bank := find_beside(PretrainedCfg(**model.pretrained_cfg), BANK_FILE, kwargs.get("cache_dir"))):
        model.load_bank(bank)
    return model


@register_model
def mar_base(pretrained: bool = False, **kwargs) -> MAR:
    """MAR-B: 12 + 12 blocks of width 768, head 6 x 1024, 207.9 M parameters; 256 px through KL-16."""
    return _mar("mar_base", pretrained, {}, kwargs)


@register_model
def mar_large(pretrained: bool = False, **kwargs) -> MAR:
    """MAR-L: 16 + 16 blocks of width 1024, head 8 x 1280, 478.3 M parameters."""
    return _mar("mar_large", pretrained, _LARGE, kwargs)


@register_model
def mar_huge(pretrained: bool = False, **kwargs) -> MAR:
    """MAR-H: 20 + 20 blocks of width 1280, head 12 x 1536, 942.4 M parameters."""
    return _mar("mar_huge", pretrained, _HUGE, kwargs)


@register_model
def mar_tiny_patch8_64(pretrained: bool = False, **kwargs) -> MAR:
    """64 px pixels as 8 x 8 tokens of 8 px."""
    return _mar("mar_tiny_patch8_64", pretrained, dict(_TINY, img_size=64, patch_size=8, class_num=100), kwargs)


@register_model
def mar_tiny_patch4_32(pretrained: bool = False, **kwargs) -> MAR:
    """32 px pixels as 8 x 8 tokens of 4 px."""
    return _mar("mar_tiny_patch4_32", pretrained, dict(_TINY, img_size=32, patch_size=4, class_num=10), kwargs)


@register_model
def mar_mini_patch1_8(pretrained: bool = False, **kwargs) -> MAR:
    """8 px digits, a token a pixel."""
    return _mar("mar_mini_patch1_8", pretrained, dict(_MINI, img_size=8, patch_size=1, class_num=10), kwargs)


@register_model
def cmar_base(pretrained: bool = False, **kwargs) -> MAR:
    """`mar_base` along collapse orders: its order bank comes with the weights."""
    return _mar("cmar_base", pretrained, {}, kwargs)


@register_model
def cmar_large(pretrained: bool = False, **kwargs) -> MAR:
    """`mar_large` along collapse orders: its order bank comes with the weights."""
    return _mar("cmar_large", pretrained, _LARGE, kwargs)


@register_model
def cmar_huge(pretrained: bool = False, **kwargs) -> MAR:
    """`mar_huge` along collapse orders: its order bank comes with the weights."""
    return _mar("cmar_huge", pretrained, _HUGE, kwargs)


@register_model
def cmar_tiny_patch8_64(pretrained: bool = False, **kwargs) -> MAR:
    """`mar_tiny_patch8_64` along collapse orders: its order bank comes with the weights."""
    return _mar("cmar_tiny_patch8_64", pretrained, dict(_TINY, img_size=64, patch_size=8, class_num=100), kwargs)


@register_model
def cmar_tiny_patch4_32(pretrained: bool = False, **kwargs) -> MAR:
    """`mar_tiny_patch4_32` along collapse orders: its order bank comes with the weights."""
    return _mar("cmar_tiny_patch4_32", pretrained, dict(_TINY, img_size=32, patch_size=4, class_num=10), kwargs)


@register_model
def cmar_mini_patch1_8(pretrained: bool = False, **kwargs) -> MAR:
    """`mar_mini_patch1_8` along collapse orders: its order bank comes with the weights."""
    return _mar("cmar_mini_patch1_8", pretrained, dict(_MINI, img_size=8, patch_size=1, class_num=10), kwargs)
