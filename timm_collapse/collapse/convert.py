"""collapse: one line makes any supported ViT see only the patches that come first in its orderer's order."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models._input import update_model_args
from timm.models.beit import Beit
from timm.models.cait import Cait
from timm.models.deepseek_vit import DeepseekVitClassifier, DeepseekVitEncoder
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.gemma4_vit import Gemma4VitClassifier, Gemma4VitEncoder
from timm.models.naflexvit import NaFlexVit
from timm.models.qwen3_vit import Qwen3VitClassifier, Qwen3VitEncoder
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from ..hub.files import ORDERER_FOLDER
from ..models.normalisation import Normalisation
from ..models.orderer import CollapseOrder
from ..order import CollapseError, check_keep
from ..order.errors import describe
from .base import Collapsed, check_area_bias, check_remainder, check_share, check_size_embed, default_remainder
from .classes import become, collapsed_class, overrides
from .hf_families import find_hf_adapter, hf_cfg, is_hf
from .timm import CollapsedEva, CollapsedVit
from .timm_cells import CollapsedCells, CollapsedEncoder, CollapsedGemma4, CollapsedGemma4Encoder
from .timm_families import CollapsedBeit, CollapsedCait, CollapsedNaFlex
from .unsupported import unsupported_reason
from .vlm import CollapsedVlm
from .vlm_families import find_vlm_adapter, is_vlm
from .vlm_parts import check_positions

ADAPTERS: dict[type, type[Collapsed]] = {
    VisionTransformer: CollapsedVit,
    VisionTransformerDistilled: CollapsedVit,
    Eva: CollapsedEva,
    NaFlexVit: CollapsedNaFlex,
    Cait: CollapsedCait,
    Beit: CollapsedBeit,
    Qwen3VitClassifier: CollapsedCells,
    Qwen3VitEncoder: CollapsedEncoder,
    DeepseekVitClassifier: CollapsedCells,
    DeepseekVitEncoder: CollapsedEncoder,
    Gemma4VitClassifier: CollapsedGemma4,
    Gemma4VitEncoder: CollapsedGemma4Encoder,
}
"""Base class of a model -> the mixin that collapses it."""

RELIED_ON = ("forward", "forward_features", "forward_intermediates", "forward_cls", "_pos_embed", "_forward_embeds")
"""Methods of the base class that a subclass may not override: they say where the patch tokens are."""


def collapse(
    model: nn.Module,
    orderer: CollapseOrder | str,
    keep: float | int = 0.22,
    remainder: str | None = None,
    coarse_share: float = 0.5,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    positions: str = "keep",
    area_bias: float | None = None,
    size_embed: bool | None = None,
) -> nn.Module:
    """Make a vision transformer see only the first patches of a collapse order, in place.

    The model's class becomes a subclass of its own, with the same parameter names and methods; `model.keep` may be
    changed at any time, and `model(images, order=order)` takes a given `Order`. A collapsed model can be collapsed
    again, to change the orderer. timm's `save_for_hf` writes it as a `cvit` of its architecture, with these settings:
    `pretrained_cfg["architecture"]` says so from now on.

    Args:
        model: A timm `VisionTransformer`, `VisionTransformerDistilled`, `Eva`, `NaFlexVit`, `Cait` or `Beit`, or a
            classifier or encoder of its Qwen3, Gemma 4 or DeepSeek ViT, whose patches are kept by cells; or a
            transformers ViT, DINOv2, DINOv3, SigLIP or CLIP vision model, or image Perceiver; or a vision-language
            model of transformers, see `CollapsedVlm`.
        orderer: What orders the patches, or its name, as for `CollapseOrder.named`.
        keep: Token budget, a ratio in (0, 1] of the patches, or a count of at least 2.
        remainder: What becomes of the dropped patches: "none", "fused", "coarse", "mixed", "split" or "zoom", see
            `Collapsed`. None: "split" with an `area_bias` of 0.5, the best on frozen ViTs (docs/results.md), where the
            model can take them; nothing has to be trained for it. Weights that were trained on the first patches alone
            want "none".
        coarse_share: Share of the budget that coarse tokens may take, in (0, 1].
        mean, std: Normalisation of the images that the model gets, one number or one a channel; None takes what the
            model is collapsed with already, or its `pretrained_cfg` (timm's default, ImageNet's, where it has none), or
            for transformers' models what their family is trained with; their averages for other than RGB images.
        positions: Of the text of a vision-language model: "keep" or "close", see `CollapsedVlm`.
        area_bias: How much a token counts for the number of patches it stands for, at least 0, see `Collapsed`. None: 0
            where a `remainder` is given.
        size_embed: Whether the model has a size embedding to learn, see `Collapsed`; with a new one, which is zero, its
            output is what it was. None: where it has one already. timm's models only.

    Returns:
        The same object.

    Raises:
        CollapseError: A model that cannot drop tokens (with the reason), or a wrong argument.
    """
    if not isinstance(model, nn.Module):
        raise CollapseError(f"model must be a vision transformer (nn.Module), got {describe(model)}")
    given = orderer
    if isinstance(orderer, str):
        orderer = CollapseOrder.named(orderer)
    if not isinstance(orderer, CollapseOrder):
        raise CollapseError(f"orderer must be a CollapseOrder or a name, got {describe(orderer)}")
    keep = check_keep(keep)
    if is_vlm(model):
        if remainder not in (None, "none"):
            raise CollapseError(f"remainder must be none for a vision-language model, got {remainder!r}")
        check_area_bias(area_bias or 0.0, "a vision-language model has no tokens that stand for several patches")
        check_size_embed(size_embed, "a vision-language model has no tokens that stand for several patches")
        return collapse_vlm(model, orderer, keep, positions, mean, std)
    if positions != "keep":
        raise CollapseError(f"positions must be 'keep' for other than a vision-language model, got {positions!r}")
    # all is checked before anything changes: a refused model stays as it was
    cls = type(model)
    if not isinstance(model, Collapsed):
        cls = collapsed_class(*(find_hf_adapter(model) if is_hf(model) else find_adapter(model)))
    channels = image_channels(model)
    known = model.normalisation if isinstance(model, Collapsed) else default_normalisation(model, channels)
    mean = known.mean if mean is None else Normalisation(mean, 1.0).for_channels(channels).mean
    std = known.std if std is None else Normalisation(std, std).for_channels(channels).std
    normalisation = Normalisation(mean, std).for_channels(channels)
    check_channels(orderer, channels)
    reasons = cls.why_no_remainder(model), cls.why_no_area_bias(model)
    remainder, area_bias = default_remainder(remainder, area_bias, *reasons)
    check_remainder(remainder, reasons[0])
    check_share(coarse_share)
    check_area_bias(area_bias, reasons[1])
    check_size_embed(size_embed, cls.why_no_size_embed(model))
    become(model, cls)
    model.set_up(orderer, keep, remainder, coarse_share, area_bias, normalisation, size_embed)
    cfg = {} if is_hf(model) else getattr(model, "pretrained_cfg", None) or {}
    if "architecture" in cfg and "orderer" not in getattr(model, "_model_args", {}):  # of timm, not yet a `cvit`
        own = {"architecture": "cvit", "mean": normalisation.mean, "std": normalisation.std}
        model.pretrained_cfg = model.default_cfg = {**cfg, **own}
        update_model_args(model, base=cfg["architecture"], keep=keep, orderer="")
    if "orderer" in getattr(model, "_model_args", {}):  # a `cvit`: what save_for_hf writes
        reference = given if isinstance(given, str) else orderer.baseline_name or f"./{ORDERER_FOLDER}"
        update_model_args(
            model, orderer=reference, remainder=remainder, coarse_share=coarse_share, area_bias=model.area_bias,
            size_embed=model.size_embed is not None,
        )  # fmt: skip
    return model


def collapse_vlm(
    model: nn.Module,
    orderer: CollapseOrder,
    keep: float | int,
    positions: str,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> nn.Module:
    """`collapse` for a vision-language model, and for its tower where that drops the patches itself."""
    adapter, known = (type(model), model.normalisation) if isinstance(model, CollapsedVlm) else find_vlm_adapter(model)
    normalisation = Normalisation(known.mean if mean is None else mean, known.std if std is None else std)
    check_positions(positions, adapter.closes_up)
    if not isinstance(model, CollapsedVlm):
        become(model, collapsed_class(adapter, type(model)))
    if (tower := model.tower()) is not None:
        collapse(tower, orderer, keep, "none", mean=normalisation.mean, std=normalisation.std)
    model.set_up(orderer, keep, positions, normalisation)
    return model


def image_channels(model: nn.Module) -> int:
    """Channels of the images that a model takes."""
    embed = next((getattr(model, name) for name in ("patch_embed", "embeds") if hasattr(model, name)), model)
    convs = (module.in_channels for module in embed.modules() if isinstance(module, nn.Conv2d))
    return getattr(embed, "in_chans", None) or next(convs, getattr(model, "in_chans", 3))


def default_normalisation(model: nn.Module, channels: int) -> Normalisation:
    """What a plain model's images are normalised with, as far as is known."""
    cfg = hf_cfg(model) if is_hf(model) else getattr(model, "pretrained_cfg", None) or {}
    known = Normalisation(cfg.get("mean") or IMAGENET_DEFAULT_MEAN, cfg.get("std") or IMAGENET_DEFAULT_STD)
    return known if len(known.mean) == channels else known.grey()


def check_channels(orderer: CollapseOrder, channels: int) -> None:
    """Raises CollapseError where an orderer cannot see the images of a model."""
    if orderer.baseline_name is None and channels not in (1, 3):
        raise CollapseError(
            f"orderer: a {type(orderer.model).__name__} takes RGB images, or grey ones as RGB, but the model's have "
            f"{channels} channels; baselines, such as 'bayer', order images of any channels"
        )


def find_adapter(model: nn.Module) -> tuple[type[Collapsed], type]:
    """The mixin for a model, and the model's class.

    Raises:
        CollapseError: There is none, with the reason.
    """
    cls = type(model)
    base = next((base for base in cls.__mro__ if base in ADAPTERS), None)
    if base is None:
        raise CollapseError(
            f"model: {cls.__name__} cannot be collapsed: {unsupported_reason(model)}; supported are "
            f"{', '.join(c.__name__ for c in ADAPTERS)}"
        )
    for name in RELIED_ON:
        if getattr(cls, name, None) is not getattr(base, name, None) or overrides(model, name):
            raise CollapseError(
                f"model: {cls.__name__} cannot be collapsed: it overrides {base.__name__}.{name}, on which collapse "
                "relies"
            )
    if getattr(getattr(model, "patch_drop", None), "prob", 0):
        raise CollapseError(
            f"model: patch_drop_rate must be 0, got {model.patch_drop.prob}: collapse takes the place of random drop"
        )
    if hasattr(getattr(model, "patch_embed", None), "backbone"):
        warnings.warn(
            f"{cls.__name__} has a convolutional stem: its tokens have seen more of the image than their own patch",
            stacklevel=3,
        )
    return ADAPTERS[base], cls
