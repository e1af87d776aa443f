"""collapse: one line makes any supported ViT see only the patches that come first in its orderer's order."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from ..order import CollapseError
from ..order.errors import describe
from .collapsed import REMAINDERS, Collapsed, CollapsedEva, CollapsedVit, check_keep, collapsed_class
from .orderer import CollapseOrder

ADAPTERS: dict[type, type[Collapsed]] = {
    VisionTransformer: CollapsedVit,
    VisionTransformerDistilled: CollapsedVit,
    Eva: CollapsedEva,
}
"""Base class of a model -> the mixin that collapses it."""


def collapse(
    model: nn.Module,
    orderer: CollapseOrder | str,
    keep: float | int = 0.22,
    remainder: str = "none",
    coarse_share: float = 0.5,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> nn.Module:
    """Make a vision transformer see only the first patches of a collapse order, in place.

    The model's class becomes a subclass of its own, with the same parameter names and methods; `model.keep` may be
    changed at any time, and `model(images, order=order)` takes a given `Order`. A collapsed model can be collapsed
    again, to change the orderer.

    Args:
        model: A timm `VisionTransformer`, `VisionTransformerDistilled` or `Eva`.
        orderer: What orders the patches, or its name, as for `CollapseOrder.from_pretrained`, or a baseline's.
        keep: Token budget, a ratio in (0, 1] of the patches, or a count.
        remainder: What becomes of the dropped patches: "none", "fused" or "coarse", see `Collapsed`.
        coarse_share: Share of the budget that coarse tokens may take, in (0, 1].
        mean, std: Normalisation of the images that the model gets, per channel; None takes the model's
            `pretrained_cfg`.

    Returns:
        The same object.

    Raises:
        CollapseError: A model that cannot drop tokens (with the reason), or a wrong argument.
    """
    if not isinstance(model, nn.Module):
        raise CollapseError(f"model must be a vision transformer (nn.Module), got {describe(model)}")
    if isinstance(orderer, str):
        orderer = CollapseOrder.named(orderer)
    if not isinstance(orderer, CollapseOrder):
        raise CollapseError(f"orderer must be a CollapseOrder or a name, got {describe(orderer)}")
    keep = check_keep(keep)
    if remainder not in REMAINDERS:
        raise CollapseError(f"remainder must be one of {', '.join(REMAINDERS)}, got {remainder!r}")
    if not 0 < coarse_share <= 1:
        raise CollapseError(f"coarse_share must be in (0, 1], got {coarse_share!r}")
    cfg = getattr(model, "pretrained_cfg", None) or {}
    mean, std = mean or cfg.get("mean") or (0.5,) * 3, std or cfg.get("std") or (0.5,) * 3
    if not isinstance(model, Collapsed):
        adapter, base = find_adapter(model)
        model.__class__ = collapsed_class(adapter, base)
    model._setup(orderer, keep, remainder, coarse_share, mean, std)
    return model


def find_adapter(model: nn.Module) -> tuple[type[Collapsed], type]:
    """The mixin for a model, and the model's class.

    Raises:
        CollapseError: There is none, with the reason.
    """
    cls = type(model)
    adapter = ADAPTERS.get(cls) or next((ADAPTERS[base] for base in cls.__mro__ if base in ADAPTERS), None)
    if adapter is None:
        raise CollapseError(
            f"model: {cls.__name__} cannot be collapsed; supported are {', '.join(c.__name__ for c in ADAPTERS)}"
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
    return adapter, cls
