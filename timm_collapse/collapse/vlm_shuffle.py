"""Vision-language models whose connector shuffles the patches of a cell into one token: Idefics3, SmolVLM, InternVL."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..models.transformer import gather_tokens
from ..order import CollapseError
from ..order.errors import describe
from .cells import patches_of_cells
from .vlm import CollapsedVlm
from .vlm_parts import core, images_of_size, transformers_module
from .vlm_text import Kept


class CollapsedIdefics3(CollapsedVlm):
    """Idefics3 and SmolVLM: cells of s x s patches of each tile are shuffled into one token."""

    image_inputs = ("pixel_values", "pixel_attention_mask")

    def _tiles(self, inputs: dict[str, Any]) -> tuple[Tensor, Tensor, list[int]]:
        """Real tiles (n, 3, H, W), which of their patches are inside the image (n, h, w), and tiles a sample."""
        pixels, mask = inputs["pixel_values"], inputs.get("pixel_attention_mask")
        if not isinstance(pixels, Tensor) or pixels.ndim != 5:
            raise CollapseError(f"pixel_values must be a tensor of shape (B, tiles, C, H, W), got {describe(pixels)}")
        p, size = core(self).vision_model.patch_size, tuple(pixels.shape[-2:])
        side = p * core(self).connector.scale_factor
        if any(length % side for length in size):
            raise CollapseError(f"pixel_values must have sides that are multiples of {side}, whole cells, got {size}")
        if mask is not None and mask.shape != (shape := (*pixels.shape[:2], *size)):
            raise CollapseError(f"pixel_attention_mask must be of shape {shape}, as pixel_values, got {describe(mask)}")
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
        module = transformers_module(tower)
        mask = module.create_bidirectional_mask(
            config=tower.config,
            inputs_embeds=tokens,
            attention_mask=inside.to(patches.device).flatten(1).gather(1, patches),
        )
        hidden = tower.post_layernorm(tower.encoder(inputs_embeds=tokens, attention_mask=mask).last_hidden_state)
        features = connector.modality_projection(hidden.unflatten(1, (-1, s * s)).flatten(2))
        features = [group.flatten(0, 1) for group in features.split(samples)]
        return module.BaseModelOutputWithPooling(last_hidden_state=hidden, pooler_output=features)


class CollapsedInternVl(CollapsedVlm):
    """InternVL: cells of s x s patches of each tile are shuffled into one token."""

    def _images(self, inputs: dict[str, Any]) -> list[tuple[list[int], Tensor, tuple[int, int]]]:
        config, side = core(self).vision_tower.config, self._cell_side()
        images = images_of_size(inputs["pixel_values"], tuple(config.image_size))
        grid = tuple(pixels // p // side for pixels, p in zip(config.image_size, config.patch_size))
        return [(list(range(images.shape[0])), images, grid)]

    def _cell_side(self) -> int:
        return round(1 / core(self).config.downsample_ratio)

    def _encode(self, inputs: dict[str, Any], kept: Kept):
        model, side = core(self), self._cell_side()
        tower, config = model.vision_tower, model.config
        layer, strategy = (
            getattr(config, name) if inputs.get(name) is None else inputs[name]
            for name in ("vision_feature_layer", "vision_feature_select_strategy")
        )
        if strategy != "default":
            raise CollapseError(
                f"vision_feature_select_strategy must be 'default' for InternVL, got {strategy!r}: its class token is "
                "in no cell"
            )
        ((_, _, grid),) = self._images(inputs)
        tokens = tower.embeddings(inputs["pixel_values"].to(tower.dtype))  # the class token first
        patches = patches_of_cells(torch.stack(kept.cells).to(tokens.device), grid, side)
        hidden = torch.cat([tokens[:, :1], gather_tokens(tokens[:, 1:], patches)], 1)
        blocks = tower.encoder.layer
        for block in blocks[: layer % (len(blocks) + 1)]:  # the embeddings are the first of the hidden states
            hidden = block(hidden)
        if layer == -1:
            hidden = tower.layernorm(hidden)
        features = model.multi_modal_projector(hidden[:, 1:].unflatten(1, (-1, side**2)).flatten(2))
        return transformers_module(model).BaseModelOutputWithPooling(last_hidden_state=hidden, pooler_output=features)
