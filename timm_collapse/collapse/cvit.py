"""CViT: timm's vision transformers, registered as collapsed models.

Each is the timm architecture that its docstring names, with that architecture's pretrained weights under the same tags,
collapsed by a bundled orderer: with `pretrained=True` the paper's training-free ViT+C. What `collapse` takes is taken
by name: `timm.create_model("cvit_base_patch16", pretrained=True, keep=0.3, orderer="bayer", remainder="coarse")`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from timm.models import (
    PretrainedCfg,
    generate_default_cfgs,
    get_arch_pretrained_cfgs,
    get_pretrained_cfg,
    model_entrypoint,
    register_model,
)
from timm.models._features import FeatureGetterNet
from timm.models._input import update_model_args
from torch import nn

from ..hub.download import find_orderer, local_weights, without_weight
from ..hub.files import ORDERER_FOLDER
from ..models.orderer import CollapseOrder
from ..models.registry import pixel_cfg, register, take_pretrained_cfg
from .convert import collapse
from .remainder import default_orderer

BASES = {
    "cvit_tiny_patch16": "vit_tiny_patch16_224",
    "cvit_small_patch16": "vit_small_patch16_224",
    "cvit_base_patch16": "vit_base_patch16_224",
    "cvit_large_patch16": "vit_large_patch16_224",
    "cvit_base_patch8": "vit_base_patch8_224",
    "cvit_small_patch14_dinov2": "vit_small_patch14_dinov2",
    "cvit_base_patch14_dinov2": "vit_base_patch14_dinov2",
    "cvit_large_patch14_dinov2": "vit_large_patch14_dinov2",
    "cvit_small_patch16_dinov3": "vit_small_patch16_dinov3",
    "cvit_base_patch16_dinov3": "vit_base_patch16_dinov3",
    "cvit_base_patch16_siglip": "vit_base_patch16_siglip_224",
}
"""Collapsed architecture -> the timm architecture whose shape and weights it has."""

RESAMPLED = {
    f"cvit_{size}_patch{patch}": f"cvit_{size}_patch16"
    for size in ("tiny", "small", "base")
    for patch in (8, 4, 2, 1)
    if f"cvit_{size}_patch{patch}" not in BASES
}
"""Architecture with smaller patches -> the one with 16 px patches from whose weights it starts."""


def _base_cfgs() -> dict[str, Any]:
    """Each base's pretrained configurations, under the collapsed name: the weights stay where timm has them."""
    return {
        full.replace(base, name, 1): cfg
        for name, base in {**BASES, **{name: BASES[large] for name, large in RESAMPLED.items()}}.items()
        for full, cfg in get_arch_pretrained_cfgs(base).items()
    }


_VIT_KEYS = {"first_conv": "patch_embed.proj", "classifier": "head"}

default_cfgs = generate_default_cfgs(
    {
        **_base_cfgs(),
        "cvit_tiny_patch8_64.tin100": pixel_cfg("cvit_tiny_patch8_64.tin100", num_classes=100, **_VIT_KEYS),
        "cvit_tiny_patch4_32.cifar10": pixel_cfg("cvit_tiny_patch4_32.cifar10", 32, num_classes=10, **_VIT_KEYS),
    }
)


def _cvit(
    name: str,
    pretrained: bool,
    kwargs: dict[str, Any],
    base: str = "",
    orderer: str = "collapse_ranker_tiny_224",
    cells_orderer: str = "collapse_ranker_cells_224",
    keep: float | int = 0.22,
    remainder: str | None = None,
    coarse_share: float = 0.5,
    area_bias: float | None = None,
    size_embed: bool | None = None,
    **shape: Any,
) -> nn.Module:
    """Build the base architecture (weights included, where asked for) and collapse it.

    Args:
        name: Collapsed architecture.
        pretrained: Load weights.
        kwargs: The caller's arguments: those of `collapse` and of the base architecture.
        base: The timm architecture; empty takes that of BASES.
        orderer, keep, remainder, coarse_share, area_bias, size_embed: Defaults of `collapse`'s arguments.
        cells_orderer: Default of the orderer where the order decides on cells.
        shape: Defaults of the base's arguments.
    """
    options = {"orderer": None, "keep": keep, "remainder": remainder}
    options |= {"coarse_share": coarse_share, "area_bias": area_bias, "size_embed": size_embed}
    options = {key: kwargs.pop(key, value) for key, value in options.items()}
    if options["orderer"] is None:
        options["orderer"] = default_orderer(options["remainder"], orderer, cells_orderer)
    cfg = take_pretrained_cfg(name, kwargs)
    source, learned = local_weights(name, cfg, kwargs.get("cache_dir")) if pretrained else cfg, None
    if pretrained:
        source, learned = without_weight(source, "size_embed")
        if options["size_embed"] is None:
            options["size_embed"] = learned is not None
    reference = options["orderer"]
    options["orderer"] = orderer_from(reference, cfg, kwargs.get("cache_dir"))
    model = model_entrypoint(base or BASES[name])(pretrained, pretrained_cfg=source, **{**shape, **kwargs})
    vit = model.model if isinstance(model, FeatureGetterNet) else model  # features_only
    vit.pretrained_cfg = vit.default_cfg = cfg.to_dict()
    # save_for_hf writes these; `collapse` and `keep` keep them up to date
    vit._model_args = options | {"orderer": reference}
    collapse(vit, **options)
    if learned is not None and vit.size_embed is not None:
        vit.size_embed.data.copy_(learned)
    if isinstance(reference, str):
        update_model_args(vit, orderer=reference)
    return model


def orderer_from(reference: str | CollapseOrder, cfg: PretrainedCfg, cache_dir: str | None = None) -> CollapseOrder:
    """The orderer that a collapsed model's arguments name.

    Args:
        reference: A name as `CollapseOrder.named` takes it, or an orderer. One that ends in "/orderer" is beside the
            weights, if the model is loaded from a folder or repository that has it there.
        cfg: Where the model's weights are.
    """
    if not isinstance(reference, str):
        return reference
    if reference.split("/")[-1] == ORDERER_FOLDER and (folder := find_orderer(cfg, cache_dir)):
        return CollapseOrder.from_pretrained(str(folder))
    return CollapseOrder.named(reference)


@register_model
def cvit(pretrained: bool = False, base: str = "vit_base_patch16_224", **kwargs) -> nn.Module:
    """Any timm model that `collapse` takes, collapsed; what `save_for_hf` of one writes is this name and its `base`."""
    if not kwargs.get("pretrained_cfg"):
        kwargs["pretrained_cfg"] = replace(get_pretrained_cfg(base), architecture="cvit")
    return _cvit("cvit", pretrained, kwargs, base=base.split(".")[0])


@register_model
def cvit_tiny_patch16(pretrained: bool = False, **kwargs) -> nn.Module:
    """`vit_tiny_patch16_224`, collapsed."""
    return _cvit("cvit_tiny_patch16", pretrained, kwargs, orderer="collapse_ranker_nano_224")


@register_model
def cvit_small_patch16(pretrained: bool = False, **kwargs) -> nn.Module:
    """`vit_small_patch16_224`, collapsed."""
    return _cvit("cvit_small_patch16", pretrained, kwargs, orderer="collapse_ranker_nano_224")


@register_model
def cvit_base_patch16(pretrained: bool = False, **kwargs) -> nn.Module:
    """`vit_base_patch16_224`, collapsed: the paper's model."""
    return _cvit("cvit_base_patch16", pretrained, kwargs)


@register_model
def cvit_large_patch16(pretrained: bool = False, **kwargs) -> nn.Module:
    """`vit_large_patch16_224`, collapsed."""
    return _cvit("cvit_large_patch16", pretrained, kwargs)


@register_model
def cvit_base_patch8(pretrained: bool = False, **kwargs) -> nn.Module:
    """`vit_base_patch8_224`, collapsed: 784 patches."""
    return _cvit("cvit_base_patch8", pretrained, kwargs)


@register_model
def cvit_small_patch14_dinov2(pretrained: bool = False, **kwargs) -> nn.Module:
    """`vit_small_patch14_dinov2`, collapsed: 1,369 patches at its 518 px."""
    return _cvit("cvit_small_patch14_dinov2", pretrained, kwargs)


@register_model
def cvit_base_patch14_dinov2(pretrained: bool = False, **kwargs) -> nn.Module:
    """`vit_base_patch14_dinov2`, collapsed."""
    return _cvit("cvit_base_patch14_dinov2", pretrained, kwargs)


@register_model
def cvit_large_patch14_dinov2(pretrained: bool = False, **kwargs) -> nn.Module:
    """`vit_large_patch14_dinov2`, collapsed."""
    return _cvit("cvit_large_patch14_dinov2", pretrained, kwargs)


@register_model
def cvit_small_patch16_dinov3(pretrained: bool = False, **kwargs) -> nn.Module:
    """`vit_small_patch16_dinov3`, collapsed."""
    return _cvit("cvit_small_patch16_dinov3", pretrained, kwargs)


@register_model
def cvit_base_patch16_dinov3(pretrained: bool = False, **kwargs) -> nn.Module:
    """`vit_base_patch16_dinov3`, collapsed."""
    return _cvit("cvit_base_patch16_dinov3", pretrained, kwargs)


@register_model
def cvit_base_patch16_siglip(pretrained: bool = False, **kwargs) -> nn.Module:
    """`vit_base_patch16_siglip_224`, collapsed."""
    return _cvit("cvit_base_patch16_siglip", pretrained, kwargs)


def _resampled(name: str, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    """An architecture of RESAMPLED."""
    patch_size = int(name.rpartition("patch")[2])
    return _cvit(name, pretrained, kwargs, base=BASES[RESAMPLED[name]], patch_size=patch_size)


for _name, _large in RESAMPLED.items():
    register(_name, _resampled, __name__, f"`{_large}` with smaller patches and the same weights, resampled.")


@register_model
def cvit_tiny_patch8_64(pretrained: bool = False, **kwargs) -> nn.Module:
    """Width 192, 6 blocks, 8 x 8 patches of 8 px: for 64 px images."""
    orderer = "collapse_ranker_tiny.tin100_features"
    return _small("cvit_tiny_patch8_64", pretrained, kwargs, orderer, img_size=64, patch_size=8)


@register_model
def cvit_tiny_patch4_32(pretrained: bool = False, **kwargs) -> nn.Module:
    """Width 192, 6 blocks, 8 x 8 patches of 4 px: for 32 px images."""
    orderer = "collapse_ranker_tiny.cifar10_features"
    return _small("cvit_tiny_patch4_32", pretrained, kwargs, orderer, img_size=32, patch_size=4)


def _small(name: str, pretrained: bool, kwargs: dict[str, Any], orderer: str, **shape: Any) -> nn.Module:
    """`vit_tiny_patch16_224` at half its depth, for small images; trained on the first patches alone."""
    shape |= {"remainder": "none", "depth": 6}
    return _cvit(name, pretrained, kwargs, base="vit_tiny_patch16_224", orderer=orderer, cells_orderer=orderer, **shape)
