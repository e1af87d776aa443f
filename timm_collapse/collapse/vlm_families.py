"""How the tower of each supported vision-language model meets its language model, and what its cells are.

One token a patch (LLaVA, PaliGemma): the tower itself is collapsed. Cells of merged patches (Qwen2.5-VL, Qwen3-VL;
Idefics3, SmolVLM and InternVL by pixel shuffle): all patches of a kept cell are seen, at their places.
"""

from __future__ import annotations

import inspect
from typing import Any

from timm.data.constants import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_INCEPTION_MEAN,
    IMAGENET_INCEPTION_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)
from torch import Tensor, nn

from ..models.normalisation import Normalisation
from ..order import CollapseError
from .classes import overrides
from .hf_families import find_hf_adapter, hf_cfg
from .holder import HoldsOrderer
from .vlm import CollapsedVlm
from .vlm_parts import core, images_of_size
from .vlm_qwen import CollapsedQwenVl
from .vlm_shuffle import CollapsedIdefics3, CollapsedInternVl
from .vlm_text import Kept

IMAGENET = Normalisation(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
HALF = Normalisation(IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD)
CLIP = Normalisation(OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)


class CollapsedLlava(CollapsedVlm):
    """LLaVA-1.5 and its kin: a CLIP or SigLIP tower, one token a patch."""

    def tower(self) -> nn.Module:
        return core(self).vision_tower

    @HoldsOrderer.keep.setter
    def keep(self, keep: float | int) -> None:
        HoldsOrderer.keep.fset(self, keep)
        self.tower().keep = keep

    def _images(self, inputs: dict[str, Any]) -> list[tuple[list[int], Tensor, tuple[int, int]]]:
        config = self.tower().config
        images = images_of_size(inputs["pixel_values"], (config.image_size,) * 2)
        return [(list(range(images.shape[0])), images, (config.image_size // config.patch_size,) * 2)]

    def _leading(self, inputs: dict[str, Any]) -> int:
        strategy = inputs.get("vision_feature_select_strategy")
        strategy = strategy or getattr(self.config, "vision_feature_select_strategy", "default")
        return 0 if strategy == "default" else self.tower().num_prefix_tokens

    def _encode(self, inputs: dict[str, Any], kept: Kept):
        named = ("vision_feature_layer", "vision_feature_select_strategy")
        chosen = {name: inputs[name] for name in named if inputs.get(name) is not None}
        pixels = inputs["pixel_values"]
        return core(self).get_image_features(pixels, **chosen, order=kept.order, return_dict=True)


class CollapsedPaliGemma(CollapsedLlava):
    """PaliGemma: a SigLIP tower, one token a patch; prompt and image see each other."""

    def _positions_of(self, inputs: dict[str, Any], generating: bool) -> Tensor | None:
        positions = super()._positions_of(inputs, generating)
        return positions if generating else positions + 1  # it counts from 1; in generate it adds that itself


SUPPORTED_VLM: dict[str, tuple[type[CollapsedVlm], Normalisation | None]] = {
    "LlavaForConditionalGeneration": (CollapsedLlava, None),
    "PaliGemmaForConditionalGeneration": (CollapsedPaliGemma, None),
    "Qwen2VLForConditionalGeneration": (CollapsedQwenVl, CLIP),
    "Qwen2_5_VLForConditionalGeneration": (CollapsedQwenVl, CLIP),
    "Qwen3VLForConditionalGeneration": (CollapsedQwenVl, HALF),
    "Idefics3ForConditionalGeneration": (CollapsedIdefics3, HALF),
    "SmolVLMForConditionalGeneration": (CollapsedIdefics3, HALF),
    "InternVLForConditionalGeneration": (CollapsedInternVl, IMAGENET),
}
"""Class of a vision-language model -> the mixin that collapses it, and the normalisation of its processor's pictures;
None: the tower's."""

REASONS = {
    "LlavaNext": "tiles of one picture are cut and joined by line after the tower",
    "LlavaOnevision": "tiles of one picture are cut and joined by line after the tower",
    "Mllama": "the language model reads the tower by cross-attention, there are no image tokens to drop",
    "Gemma3": "image tokens are averages over pools of the whole grid",
    "Blip2": "a query transformer makes a fixed number of image tokens",
    "InstructBlip": "a query transformer makes a fixed number of image tokens",
}
"""Why other families, by the beginning of their class names, cannot drop cells."""


def is_vlm(model: nn.Module) -> bool:
    """Whether a model is one of transformers' that reads text and images."""
    name, config = _stock_name(model), getattr(model, "config", None)
    reads = any(hasattr(config, token) for token in ("image_token_id", "image_token_index"))
    return bool(name) and (name.startswith(tuple(REASONS)) or reads and hasattr(config, "text_config"))


def find_vlm_adapter(model: nn.Module) -> tuple[type[CollapsedVlm], Normalisation]:
    """The mixin of a vision-language model, and the normalisation of its pictures.

    Raises:
        CollapseError: It cannot be collapsed, with the reason.
    """
    name = _stock_name(model)
    if name not in SUPPORTED_VLM:
        reason = next((why for start, why in REASONS.items() if name.startswith(start)), "its family is not known here")
        raise CollapseError(
            f"model: {name} cannot be collapsed: {reason}; supported vision-language models are "
            f"{', '.join(SUPPORTED_VLM)}"
        )
    if "mm_encoder_outputs" not in inspect.signature(type(model).forward).parameters:
        raise CollapseError(
            f"model: {name} of this version of transformers takes no encoded images (mm_encoder_outputs of its forward "
            "method), which collapse relies on; a newer transformers does"
        )
    if any(overrides(part, "forward") for part in (model, *model.children())):
        raise CollapseError(f"model: the forward method of {name} was replaced; collapse it before")
    adapter, normalisation = SUPPORTED_VLM[name]
    if normalisation is None:
        tower = core(model).vision_tower
        find_hf_adapter(tower)  # raises where it cannot be collapsed
        cfg = hf_cfg(tower)
        normalisation = Normalisation(cfg["mean"], cfg["std"])
    return adapter, normalisation


def _stock_name(model: nn.Module) -> str:
    """Name of the class of transformers that a model is of; "" for none."""
    return next((c.__name__ for c in type(model).__mro__ if c.__module__.startswith("transformers.")), "")
