"""The models of `transformers` that can be collapsed, and the mixin and normalisation of each."""

from __future__ import annotations

from timm.data.constants import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_INCEPTION_MEAN,
    IMAGENET_INCEPTION_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)
from torch import nn

from ..order import CollapseError
from .base import Collapsed
from .classes import overrides
from .hf import CollapsedDinov2, CollapsedDinov3, CollapsedHf, Part, trunk
from .perceiver import CollapsedPerceiver

_HALF = {"mean": IMAGENET_INCEPTION_MEAN, "std": IMAGENET_INCEPTION_STD}
_IMAGENET = {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}
_OPENAI = {"mean": OPENAI_CLIP_MEAN, "std": OPENAI_CLIP_STD}
SUPPORTED: dict[str, tuple[type[CollapsedHf], dict]] = {
    "ViTModel": (CollapsedHf, _HALF),
    "ViTForImageClassification": (CollapsedHf, _HALF),
    "Dinov2Model": (CollapsedDinov2, _IMAGENET),
    "Dinov2ForImageClassification": (CollapsedDinov2, _IMAGENET),
    "Dinov2WithRegistersModel": (CollapsedDinov2, _IMAGENET),
    "Dinov2WithRegistersForImageClassification": (CollapsedDinov2, _IMAGENET),
    "DINOv3ViTModel": (CollapsedDinov3, _IMAGENET),
    "SiglipVisionModel": (CollapsedHf, _HALF),
    "SiglipVisionTransformer": (CollapsedHf, _HALF),  # inside of SiglipVisionModel before transformers 5
    "SiglipForImageClassification": (CollapsedHf, _HALF),
    "CLIPVisionModel": (CollapsedHf, _OPENAI),
    "CLIPVisionTransformer": (CollapsedHf, _OPENAI),
    "CLIPVisionModelWithProjection": (CollapsedHf, _OPENAI),
    "CLIPForImageClassification": (CollapsedHf, _OPENAI),
    "PerceiverForImageClassificationLearned": (CollapsedPerceiver, _IMAGENET),
    "PerceiverForImageClassificationFourier": (CollapsedPerceiver, _IMAGENET),
}
"""Class of a transformers model -> the mixin that collapses it, and the normalisation its checkpoints expect."""


def is_hf(model: nn.Module) -> bool:
    """Whether a model is one of `transformers`, or a subclass of one."""
    return any(cls.__module__.startswith("transformers.") for cls in type(model).__mro__)


def _family(model: nn.Module) -> tuple[type[CollapsedHf], dict] | None:
    names = (cls.__name__ for cls in type(model).__mro__ if cls.__module__.startswith("transformers."))
    return next((SUPPORTED[name] for name in names if name in SUPPORTED), None)


def hf_cfg(model: nn.Module) -> dict:
    """The normalisation that a model's checkpoints expect, as `pretrained_cfg` has it; empty where none is known."""
    family = _family(model)
    return {} if family is None else family[1]


def find_hf_adapter(model: nn.Module) -> tuple[type[CollapsedHf], type]:
    """The mixin for a model, and the model's class.

    Raises:
        CollapseError: There is none, or a part of the model is collapsed already, with the reason.
    """
    cls, family = type(model), _family(model)
    if family is None:
        reason = f"supported are {', '.join(SUPPORTED)}"
        tower = getattr(model, "vision_model", None)
        if cls.__name__.endswith("Backbone"):
            reason = f"a backbone returns maps of the whole grid; {reason}"
        elif isinstance(tower, nn.Module) and _family(tower):
            reason = "collapse its image tower, model.vision_model"
        elif hasattr(model, "timm_model"):
            reason = "collapse the timm model inside, model.timm_model"
        raise CollapseError(f"model: {cls.__name__} cannot be collapsed; {reason}")
    if any(isinstance(module, (Collapsed, Part)) for module in model.modules()):
        raise CollapseError(
            f"model: {cls.__name__} holds, or is part of, a model that is collapsed already; collapse one of the two"
        )
    if any(overrides(module, "forward") for module in (model, *trunk(model).embeddings.modules())):
        raise CollapseError(f"model: the forward method of {cls.__name__} was replaced; collapse it before")
    return family[0], cls
