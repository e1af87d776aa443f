"""How the tower of each supported vision-language model meets its language model, and what its cells are.

One token a patch (LLaVA, PaliGemma): the tower itself is collapsed. Cells of merged patches (Qwen2.5-VL, Qwen3-VL;
Idefics3 and SmolVLM by pixel shuffle): all patches of a kept cell are seen, at their places.
"""

from __future__ import annotations

import inspect
import sys
from typing import Any

import torch
from timm.data.constants import (
    IMAGENET_INCEPTION_MEAN,
    IMAGENET_INCEPTION_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)
from torch import Tensor, nn
from torch.nn.functional import pad

from ..models.normalisation import Normalisation
from ..models.transformer import gather_tokens
from ..order import CollapseError
from ..order.errors import describe
from .cells import patches_of_cells
from .hf_families import find_hf_adapter, hf_cfg
from .holder import HoldsOrderer
from .vlm import CollapsedVlm, core
from .vlm_text import Kept

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
        images = inputs["pixel_values"]
        if not isinstance(images, Tensor) or images.ndim != 4:
            raise CollapseError(f"pixel_values must be a tensor of shape (B, C, H, W), got {describe(images)}")
        config = self.tower().config
        side = config.image_size
        if tuple(images.shape[-2:]) != (side, side):
            raise CollapseError(
                f"pixel_values must be {(side, side)} pixels, the tower's image_size, got {tuple(images.shape[-2:])}: "
                "was the processor made for this model?"
            )
        return [(list(range(images.shape[0])), images, (side // config.patch_size,) * 2)]

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


class CollapsedQwenVl(CollapsedVlm):
    """Qwen2-VL, Qwen2.5-VL and Qwen3-VL: cells of m x m patches are merged into one token, with three-axis places.

    Images of any size; a ratio counts for each. Windows of the tower's attention and deep-stack features follow.
    """

    image_inputs = ("pixel_values", "image_grid_thw")
    closes_up = False

    def _grids(self, inputs: dict[str, Any]) -> list[list[int]]:
        grids, pixels = inputs.get("image_grid_thw"), inputs["pixel_values"]
        if grids is None or int(grids.prod(-1).sum()) != pixels.shape[0]:
            raise CollapseError(
                f"image_grid_thw must give the grids of the {pixels.shape[0]} patches of pixel_values, got "
                f"{'none' if grids is None else grids.tolist()}"
            )
        return grids.tolist()

    def _images(self, inputs: dict[str, Any]) -> list[tuple[list[int], Tensor, tuple[int, int]]]:
        config, grids = core(self).visual.config, self._grids(inputs)
        m, p = config.spatial_merge_size, config.patch_size
        per_image = inputs["pixel_values"].split([t * h * w for t, h, w in grids])
        groups = []
        for t, h, w in dict.fromkeys(map(tuple, grids)):
            numbers = [i for i, grid in enumerate(grids) if tuple(grid) == (t, h, w)]
            patches = torch.stack([per_image[i] for i in numbers])[:, : h * w]  # the first frame
            patches = patches.reshape(len(numbers), h // m, w // m, m, m, 3, -1, p, p)[..., 0, :, :]
            images = patches.permute(0, 5, 1, 3, 6, 2, 4, 7).reshape(len(numbers), 3, h * p, w * p)
            groups.append((numbers, images, (h // m, w // m)))
        return groups

    def _encode(self, inputs: dict[str, Any], kept: Kept):
        visual, grids = core(self).visual, inputs["image_grid_thw"]
        module = _transformers_module(visual)
        unit, merge = visual.spatial_merge_size**2, visual.spatial_merge_size
        stays = kept.mask().to(grids.device)
        rows = stays.repeat_interleave(unit)
        counts = [cells.shape[0] for cells in kept.cells]
        sequences = torch.tensor([n * unit for n in counts], device=grids.device).cumsum(0)
        given = {
            "position_ids": module.get_vision_position_ids(grids, merge)[rows],
            "cu_seqlens": pad(sequences, (1, 0)).to(torch.int32),
        }
        if hasattr(visual, "interpolation_mode"):
            indices, weights = module.get_vision_interpolation_indices_and_weights(
                grids,
                num_grid_per_side=visual.num_grid_per_side,
                mode=visual.interpolation_mode,
                align_corners=visual.interpolation_align_corners,
                spatial_merge_size=merge,
            )
            given |= {"interp_indices": indices[rows], "interp_weights": weights[rows]}
        if hasattr(visual, "window_size"):
            windows, bounds = module.get_vision_window_index(grids, merge, visual.window_size, visual.patch_size)
            given |= dict(zip(("window_index", "cu_window_seqlens"), kept_windows(windows, bounds, stays, unit)))
        out = visual(inputs["pixel_values"].to(visual.dtype)[rows], grid_thw=grids, return_dict=True, **given)
        out.pooler_output = torch.split(out.pooler_output, counts)
        if getattr(out, "deepstack_features", None) is not None:
            out.deepstack_features = [torch.split(features, counts) for features in out.deepstack_features]
        return out

    def _positions_of(self, inputs: dict[str, Any], generating: bool) -> Tensor | None:
        if generating or inputs.get("input_ids") is None:  # without ids the stock model counts as in a text
            return super()._positions_of(inputs, generating)
        if inputs.get("mm_token_type_ids") is None:
            raise CollapseError(
                "mm_token_type_ids must be given while image tokens are dropped: the processor makes them"
            )
        positions, _ = core(self).get_rope_index(
            inputs["input_ids"],
            image_grid_thw=inputs["image_grid_thw"],
            attention_mask=inputs.get("attention_mask"),
            mm_token_type_ids=inputs["mm_token_type_ids"],
        )
        return positions


def kept_windows(windows: Tensor, bounds: Tensor, stays: Tensor, unit: int) -> tuple[Tensor, Tensor]:
    """Windows of the kept cells.

    Args:
        windows: (cells,) long: all cells, one window after the other.
        bounds: (w + 1,): where the windows' patches begin and end.
        stays: (cells,) bool.
        unit: Patches of a cell.

    Returns:
        The same two for the kept cells, numbered anew; windows that lose all cells are gone.
    """
    inside = stays[windows.to(stays.device)]
    numbers = stays.long().cumsum(0) - 1
    before = pad(inside.long().cumsum(0), (1, 0))
    ends = before[bounds.long().to(stays.device) // unit] * unit
    return numbers[windows.to(stays.device)[inside]], ends.unique_consecutive().to(torch.int32)


class CollapsedIdefics3(CollapsedVlm):
    """Idefics3 and SmolVLM: cells of s x s patches of each tile are shuffled into one token."""

    image_inputs = ("pixel_values", "pixel_attention_mask")

    def _tiles(self, inputs: dict[str, Any]) -> tuple[Tensor, Tensor, list[int]]:
        """Real tiles (n, 3, H, W), which of their patches are inside the image (n, h, w), and tiles a sample."""
        pixels, mask = inputs["pixel_values"], inputs.get("pixel_attention_mask")
        if not isinstance(pixels, Tensor) or pixels.ndim != 5:
            raise CollapseError(f"pixel_values must be a tensor of shape (B, tiles, C, H, W), got {describe(pixels)}")
        p = core(self).vision_model.patch_size
        real = (pixels != 0).flatten(2).any(-1)
        tiles = pixels[real]
        if mask is None:
            inside = torch.ones(tiles.shape[0], tiles.shape[2] // p, tiles.shape[3] // p, dtype=torch.bool)
        else:
            inside = mask[real].bool().unfold(1, p, p).unfold(2, p, p).flatten(3).any(-1)
        return tiles, inside.to(tiles.device), real.sum(1).tolist()

    def _images(self, inputs: dict[str, Any]) -> list[tuple[list[int], Tensor, tuple[int, int]]]:
        tiles, inside, _ = self._tiles(inputs)
        h, w = (side // core(self).connector.scale_factor for side in inside.shape[1:])
        return [(list(range(tiles.shape[0])), tiles, (h, w))]

    def _encode(self, inputs: dict[str, Any], kept: Kept):
        tower, connector = core(self).vision_model, core(self).connector
        tiles, inside, samples = self._tiles(inputs)
        s, (h, w) = connector.scale_factor, inside.shape[1:]
        tokens = tower.embeddings(pixel_values=tiles.to(tower.dtype), patch_attention_mask=inside)
        cells = torch.stack(kept.cells).to(tokens.device)  # (n, k), as all tiles have one size
        patches = patches_of_cells(cells, (h // s, w // s), s)
        tokens = gather_tokens(tokens, patches)
        module = _transformers_module(tower)
        mask = module.create_bidirectional_mask(
            config=tower.config, inputs_embeds=tokens, attention_mask=inside.flatten(1).gather(1, patches)
        )
        hidden = tower.post_layernorm(tower.encoder(inputs_embeds=tokens, attention_mask=mask).last_hidden_state)
        features = connector.modality_projection(hidden.unflatten(1, (-1, s * s)).flatten(2))
        features = [group.flatten(0, 1) for group in features.split(samples)]
        return module.BaseModelOutputWithPooling(last_hidden_state=hidden, pooler_output=features)


def _transformers_module(module: nn.Module):
    """The file of transformers that defines a module's class: its helpers are used as it uses them."""
    return next(sys.modules[c.__module__] for c in type(module).__mro__ if c.__module__.startswith("transformers."))


SUPPORTED_VLM: dict[str, tuple[type[CollapsedVlm], Normalisation | None]] = {
    "LlavaForConditionalGeneration": (CollapsedLlava, None),
    "PaliGemmaForConditionalGeneration": (CollapsedPaliGemma, None),
    "Qwen2VLForConditionalGeneration": (CollapsedQwenVl, CLIP),
    "Qwen2_5_VLForConditionalGeneration": (CollapsedQwenVl, CLIP),
    "Qwen3VLForConditionalGeneration": (CollapsedQwenVl, HALF),
    "Idefics3ForConditionalGeneration": (CollapsedIdefics3, HALF),
    "SmolVLMForConditionalGeneration": (CollapsedIdefics3, HALF),
}
"""Class of a vision-language model -> the mixin that collapses it, and the normalisation of its processor's pictures;
None: the tower's."""

REASONS = {
    "LlavaNext": "tiles of one picture are cut and joined by line after the tower",
    "LlavaOnevision": "tiles of one picture are cut and joined by line after the tower",
    "InternVL": "its pixel shuffle is wired into the tower's whole grid",
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
    if any("forward" in part.__dict__ for part in (model, *model.children())):
        raise CollapseError(
            f"model: the forward method of {name} was replaced (accelerate's hooks do that); collapse it before"
        )
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
