"""The CoMAEs that timm knows by name."""

from __future__ import annotations

from timm.models import generate_default_cfgs, register_model

from .comae import CoMAE
from .registry import build, pixel_cfg

default_cfgs = generate_default_cfgs(
    {
        "comae_tiny.tin100": pixel_cfg("comae_tiny.tin100"),
        "comae_tiny_224.untrained": pixel_cfg(img_size=224),
        "comae_base_kl16_256.untrained": pixel_cfg(img_size=256, mean=(0.5,) * 3, std=(0.5,) * 3),
        "comae_base_kl16_256_wide_encoder.untrained": pixel_cfg(img_size=256, mean=(0.5,) * 3, std=(0.5,) * 3),
    }
)


@register_model
def comae_tiny(pretrained: bool = False, **kwargs) -> CoMAE:
    """3 + 2 blocks on 8 px patches of 64 px images."""
    return build(CoMAE, "comae_tiny", pretrained, {}, kwargs)


@register_model
def comae_tiny_224(pretrained: bool = False, **kwargs) -> CoMAE:
    """The same for photos, 14 x 14 patches: images are resized to 112 px."""
    return build(CoMAE, "comae_tiny_224", pretrained, {"img_size": 112}, kwargs)


_PAPER = {"img_size": 256, "depth": 12, "decoder_depth": 12, "vae": "xwen99/mar-vae-kl16", "vae_scale": 0.2325}


@register_model
def comae_base_kl16_256(pretrained: bool = False, **kwargs) -> CoMAE:
    """The paper's size: KL-16 latents of 256 px, encoder width 64, decoder width 256."""
    return build(CoMAE, "comae_base_kl16_256", pretrained, {**_PAPER, "dim": 64, "decoder_dim": 256}, kwargs)


@register_model
def comae_base_kl16_256_wide_encoder(pretrained: bool = False, **kwargs) -> CoMAE:
    """The paper's other reading: encoder width 256, decoder width 64."""
    return build(
        CoMAE, "comae_base_kl16_256_wide_encoder", pretrained, {**_PAPER, "dim": 256, "decoder_dim": 64}, kwargs
    )
