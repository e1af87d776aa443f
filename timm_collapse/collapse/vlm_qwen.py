"""Qwen's vision-language models: their tower takes the patches of all images as one sequence, cell by cell."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..order import CollapseError
from .vlm import CollapsedVlm
from .vlm_parts import core, transformers_module
from .vlm_text import Kept


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
        module = transformers_module(visual)
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
