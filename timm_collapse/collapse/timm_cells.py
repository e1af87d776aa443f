"""Collapsed towers of vision-language models in timm: Qwen3, DeepSeek and Gemma 4 ViT, classifiers and encoders.

Their projectors and poolers merge neighbouring patches into one token. So what is ordered, kept and dropped are cells:
the patches that become one token, or single patches where nothing merges them. The kept cells of an image, one below
the other, are a picture of k m x m patches to the model's own parts, which need no change: cells stay whole, averages
are over the kept ones. Positions, absolute and rotary, are those of the patches' true places.
"""

from __future__ import annotations

import torch
from timm.layers import PatchEmbed
from timm.models.gemma4_vit import Gemma4PatchEmbed, Gemma4VisionPooler
from timm.models.naflexvit import batch_patchify
from torch import Tensor, nn
from torch.nn.functional import embedding

from ..models.transformer import gather_tokens
from ..order import CollapseError, Order
from ..order.errors import describe
from .base import Collapsed
from .cells import patches_of_cells
from .classes import Remade, become, collapsed_class
from .selection import Carrier, Selection, embed_kept, fit_images, image_size
from .timm import CollapsedTimm


class CellPatchEmbed(PatchEmbed):
    """Embeds the patches of the kept cells alone, (B, k m, m, D)."""

    carrier: Carrier

    def forward(self, x: Tensor) -> Tensor:
        selection = self.carrier.selection
        if selection is None:
            return super().forward(x)
        tokens = embed_kept(self.proj, fit_images(x, selection.grid, self.patch_size), selection)
        return self.norm(tokens).unflatten(1, (-1, selection.cell))


class KeepPositions(Remade):
    """Mixin of Qwen3's and DeepSeek's encoder: each kept patch has the positions of its place in the whole grid."""

    carrier: Carrier

    def _pos_embed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        selection = self.carrier.selection
        if selection is None:
            return super()._pos_embed(x)
        positions, rope = super()._pos_embed(x.new_zeros(1, *selection.grid, self.embed_dim))
        return x.flatten(1, 2) + embedding(selection.kept, positions[0]), rope[selection.kept].unsqueeze(1)


class CollapsedCells(CollapsedTimm):
    """`Qwen3VitClassifier` and `DeepseekVitClassifier`.

    Grids, orders and budgets are of cells. Patch features (B, H, W, D) become those of the kept cells, one below the
    other in the order of their places, (B, k m, m, D); projected tokens (B, h w, D) become (B, k, D); intermediates lie
    on the whole grid of patches. Images of any size whose patches make whole cells.
    """

    def _encoder(self) -> nn.Module:
        return getattr(self, "encoder", self)

    def _attach(self) -> None:
        encoder = self._encoder()
        if not isinstance(encoder, KeepPositions):
            become(encoder, collapsed_class(KeepPositions, type(encoder)))
        become(encoder.patch_embed, CellPatchEmbed)
        encoder.carrier = encoder.patch_embed.carrier = self.carrier

    def why_no_remainder(self) -> str:
        return "the model's tokens are whole cells of patches in their places, and none can stand for several cells"

    def _projector(self) -> nn.Module | None:
        encoder = self._encoder()
        return encoder.merger if hasattr(encoder, "merger") else encoder.aligner

    def cell_side(self) -> int:
        """Patches on a side of a cell, as the model is now; 1 where nothing merges them."""
        projector, encoder = self._projector(), self._encoder()
        if projector is None:
            return 1
        return encoder.merge_size if hasattr(encoder, "merge_size") else encoder.downsample_ratio

    def image_grid(self, images: Tensor) -> tuple[int, int]:
        """Cells (h, w) of a batch of images; raises CollapseError for a size whose patches make no whole cells."""
        if not isinstance(images, Tensor) or images.ndim != 4:
            given = "a dict" if isinstance(images, dict) else describe(images)
            raise CollapseError(f"images must be a tensor of shape (B, C, H, W) where patches are dropped, got {given}")
        encoder, size, side = self._encoder(), image_size(images), self.cell_side()
        if images.shape[1] != encoder.in_chans:
            raise CollapseError(f"images must have {encoder.in_chans} channels, as the model's, got {describe(images)}")
        embed = encoder.patch_embed
        patch = tuple(embed.patch_size)
        if getattr(embed, "dynamic_img_pad", False):
            size = tuple(-(-pixels // p) * p for pixels, p in zip(size, patch))
        if any(pixels % p for pixels, p in zip(size, patch)):
            raise CollapseError(f"images must have sides that are multiples of {patch}, got {size}")
        grid = size[0] // patch[0], size[1] // patch[1]
        if 0 in grid or any(n % side for n in grid):
            raise CollapseError(
                f"images must be whole cells of {side} x {side} patches where some are dropped, got {grid} patches: "
                f"resize to sides that are multiples of {self._patch_size()} pixels"
            )
        return grid[0] // side, grid[1] // side

    def _patch_size(self) -> tuple[int, int]:
        """Sides of a cell in pixels."""
        (p, q), side = self._encoder().patch_embed.patch_size, self.cell_side()
        return p * side, q * side

    def select(self, images: Tensor, order: Order | None = None) -> Selection | None:
        """As `Collapsed.select`: the order is of the cells, the selection of all their patches."""
        cells = super().select(images, order)
        if cells is None:
            return None
        (h, w), side = cells.grid, self.cell_side()
        return Selection(patches_of_cells(cells.kept, cells.grid, side), (h * side, w * side), cell=side)


class CollapsedEncoder(KeepPositions, CollapsedCells):
    """`Qwen3VitEncoder` and `DeepseekVitEncoder`."""

    def forward(self, x: Tensor, *, order: Order | None = None) -> Tensor:
        """As the plain model's, for the kept cells; `order` takes the place of the orderer's."""
        x, projector = self.forward_features(x, order=order), self._projector()
        if projector is not None:
            return projector(x)
        return x.mean((1, 2)) if self.global_pool == "avg" else x


class CellGemma4PatchEmbed(Gemma4PatchEmbed):
    """Embeds the patches of the kept cells alone, one cell after the other."""

    carrier: Carrier

    def forward(self, x, patch_coord=None, patch_valid=None) -> tuple[Tensor, Tensor, Tensor | None]:
        selection = self.carrier.selection
        if selection is None:
            return super().forward(x, patch_coord, patch_valid)
        patches, (_, w) = batch_patchify(x, self.patch_size, pad=False, channels_last=False)
        patches = 2 * (gather_tokens(patches, selection.kept) - 0.5)
        columns, rows = selection.kept % w, selection.kept // w
        table = self.position_embedding_table  # looked up; timm multiplies by one-hot rows, with the same result
        positions = embedding(columns, table[0]) + embedding(rows, table[1])
        tokens = self.input_proj(patches.to(self.input_proj.weight.dtype))
        return tokens + positions, torch.stack([columns, rows], -1), None


class CellPooler(Gemma4VisionPooler):
    """Averages each kept cell; timm's goes by the extent of the positions, which is the whole grid's."""

    carrier: Carrier

    def _avg_pool_by_positions(self, hidden_states: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        selection = self.carrier.selection
        if selection is None:
            return super()._avg_pool_by_positions(hidden_states, position_ids)
        cells = hidden_states.float().unflatten(1, (-1, selection.cell**2)).mean(2).to(hidden_states.dtype)
        return cells, torch.ones(cells.shape[:2], dtype=torch.bool, device=cells.device)


class CollapsedGemma4(CollapsedCells):
    """`Gemma4VitClassifier`, on batches of images (B, C, H, W) while patches are dropped.

    Patch features are the kept cells' one after the other, (B, k m^2, D).
    """

    _before_norm = ("patch_coord", "patch_valid", "indices")

    def _attach(self) -> None:
        encoder = self._encoder()
        become(encoder.patch_embed, CellGemma4PatchEmbed)
        become(encoder.pooler, CellPooler)
        encoder.patch_embed.carrier = encoder.pooler.carrier = self.carrier

    def cell_side(self) -> int:
        encoder = self._encoder()
        return encoder.pooling_kernel_size if encoder.global_pool == "soft" else 1

    def _refuse_arguments(self, args: tuple, kwargs: dict) -> None:
        """As `CollapsedTimm`'s: those of a patchified batch."""
        for name, value in {**dict(zip(("patch_coord", "patch_valid"), args)), **kwargs}.items():
            if name in ("patch_coord", "patch_valid") and value is not None:
                raise CollapseError(
                    f"{name} must be None while patches are dropped (keep={self.keep}), got {describe(value)}: pass "
                    "images of shape (B, C, H, W)"
                )

    def forward(self, x, patch_coord=None, patch_valid=None, *, order: Order | None = None) -> Tensor:
        """As the plain model's; `order` takes the place of the orderer's."""
        if order is None and self.keep == 1:  # the head averages the valid patches of a patchified batch
            return super(Collapsed, self).forward(x, patch_coord, patch_valid)
        return self.forward_head(self.forward_features(x, patch_coord, patch_valid, order=order))

    def forward_intermediates(
        self,
        x,
        patch_coord=None,
        patch_valid=None,
        indices=None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        *args,
        order: Order | None = None,
        **kwargs,
    ):
        """As `CollapsedTimm`'s; patchified batches only where all patches are kept."""
        rest = (norm, stop_early, output_fmt, intermediates_only, *args)
        if order is None and self.keep == 1:
            plain = super(Collapsed, self).forward_intermediates
            return plain(x, patch_coord, patch_valid, indices, *rest, **kwargs)
        self._refuse_arguments((patch_coord, patch_valid), {})
        return super().forward_intermediates(x, indices, False, *rest, order=order, **kwargs)


class CollapsedGemma4Encoder(CollapsedGemma4):
    """`Gemma4VitEncoder`."""

    def forward(self, x, patch_coord=None, patch_valid=None, *, order: Order | None = None) -> Tensor:
        """As the plain model's, for the kept cells; `order` takes the place of the orderer's."""
        selection = self.select(x, order)
        if selection is not None:
            self._refuse_arguments((patch_coord, patch_valid), {})
        return self.carrier.run(selection, super(Collapsed, self).forward, x, patch_coord, patch_valid)
