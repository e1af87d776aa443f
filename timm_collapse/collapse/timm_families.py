"""Further timm families that can be collapsed: NaFlexVit, Cait and Beit."""

from __future__ import annotations

from typing import NamedTuple

from timm.models.beit import Attention, RelativePositionBias
from torch import Tensor, nn

from ..order import CollapseError, Order
from ..order.errors import describe
from .base import Collapsed
from .classes import become, on_hand
from .selection import Carrier, Selection, image_size, sparse_patch_embed
from .timm import CollapsedTimm


class KeepAfterDropout(nn.Dropout):
    """The dropout that follows the position embedding, for families without `patch_drop`: then keeps the patches.

    An existing dropout becomes one by swapping its class, see `keep_after`.
    """

    carrier: Carrier
    num_prefix_tokens: int

    def forward(self, x: Tensor) -> Tensor:
        x, selection = super().forward(x), self.carrier.selection
        return x if selection is None else selection.apply(x, self.num_prefix_tokens)


def keep_after(dropout: nn.Dropout, carrier: Carrier, num_prefix_tokens: int) -> None:
    """Make a dropout also keep the selected patches, in place."""
    become(dropout, KeepAfterDropout)
    dropout.carrier, dropout.num_prefix_tokens = carrier, num_prefix_tokens


class CollapsedNaFlex(CollapsedTimm):
    """`NaFlexVit`, on batches of images (B, C, H, W) while patches are dropped; all patches are embedded."""

    def image_grid(self, x: Tensor) -> tuple[int, int]:
        if not isinstance(x, Tensor) or x.ndim != 4:
            raise CollapseError(
                f"images must be a tensor of shape (B, C, H, W) while patches are dropped (keep={self.keep}), got "
                f"{'a dict' if isinstance(x, dict) else describe(x)}: a patchified batch has no common grid"
            )
        embeds, size = self.embeds, image_size(x)
        if embeds.is_linear and not embeds.dynamic_img_pad:
            if any(side % patch for side, patch in zip(size, embeds.patch_size)):
                raise CollapseError(f"images must have sides that are multiples of {embeds.patch_size}, got {size}")
        return tuple(embeds.dynamic_feat_size(size))

    def _patch_size(self) -> tuple[int, int]:
        return tuple(self.embeds.patch_size)

    def _embed_patches(self, images: Tensor) -> Tensor:
        embeds, (p, q) = self.embeds, self.embeds.patch_size
        if not embeds.is_linear:
            return embeds.norm(embeds.proj(images).flatten(2).mT)
        b, c, h, w = images.shape
        patches = images.reshape(b, c, h // p, p, w // q, q).permute(0, 2, 4, 3, 5, 1)
        if not embeds.channels_last:
            patches = patches.permute(0, 1, 2, 5, 3, 4)
        patches = patches.flatten(1, 2).flatten(2)
        if embeds.norm_input is not None:
            patches = embeds.norm_input(patches)
        return embeds.norm(embeds.proj(patches))

    def _patch_positions(self, grid: tuple[int, int]) -> Tensor | None:
        if self.embeds.pos_embed_type == "none":
            return None
        return on_hand(self.embeds, lambda: self._positions_on_hand(grid))

    def _positions_on_hand(self, grid: tuple[int, int]) -> Tensor:
        embeds = self.embeds
        # timm adds them in place; to zeros, they are left alone
        own = next(embeds.parameters(recurse=False))
        positions = own.new_zeros(1, grid[0] * grid[1], embeds.embed_dim)
        if embeds.pos_embed_type == "factorized":
            embeds._apply_factorized_pos_embed(positions, grid_size=list(grid))
        else:
            embeds._apply_learned_pos_embed(positions, grid_size=list(grid))
        return positions

    def forward(self, x, patch_coord=None, patch_valid=None, attn_mask=None, *, order: Order | None = None) -> Tensor:
        """As the plain model's; `order` takes the place of the orderer's."""
        patchified = isinstance(x, dict) or patch_coord is not None
        if order is None and (patchified or self.keep == 1.0):
            return super(Collapsed, self).forward(x, patch_coord, patch_valid, attn_mask)  # timm's own
        self._refuse_patchified(x, patch_coord, patch_valid, order)
        return super().forward(x, order=order, patch_coord=patch_coord, patch_valid=patch_valid, attn_mask=attn_mask)

    def forward_features(
        self, patches, patch_coord=None, patch_valid=None, attn_mask=None, *, order: Order | None = None
    ):
        """As `CollapsedTimm`'s; patchified batches only where all patches are kept."""
        self._refuse_patchified(patches, patch_coord, patch_valid, order)
        return super().forward_features(
            patches, order=order, patch_coord=patch_coord, patch_valid=patch_valid, attn_mask=attn_mask
        )

    def forward_intermediates(self, x, *args, patch_coord=None, patch_valid=None, order: Order | None = None, **kwargs):
        """As `CollapsedTimm`'s; patchified batches only where all patches are kept."""
        self._refuse_patchified(x, patch_coord, patch_valid, order)
        return super().forward_intermediates(
            x, *args, order=order, patch_coord=patch_coord, patch_valid=patch_valid, **kwargs
        )

    def forward_head(self, patches: Tensor, *args, **kwargs) -> Tensor:
        """As `CollapsedTimm`'s."""
        return super().forward_head(patches, *args, **kwargs)

    def _refuse_patchified(self, x, patch_coord, patch_valid, order: Order | None) -> None:
        if order is None and self.keep == 1.0:
            return
        self.image_grid(x)
        for name, value in (("patch_coord", patch_coord), ("patch_valid", patch_valid)):
            if value is not None:
                raise CollapseError(
                    f"{name} must be None while patches are dropped (keep={self.keep}), got {describe(value)}: pass "
                    "images of shape (B, C, H, W)"
                )

    def _forward_embeds(self, x, patch_coord, patch_valid, attn_mask) -> dict[str, Tensor | None]:
        embeds = super()._forward_embeds(x, patch_coord, patch_valid, attn_mask)
        selection = self.carrier.selection
        if selection is None:
            return embeds
        if selection.extra is not None:
            selection = selection._replace(extra=self.norm_pre(selection.extra))  # the patches have had it
        embeds["patches"] = selection.apply(embeds["patches"], self.num_prefix_tokens)
        rope = embeds["rope_embeds"]
        if rope is not None:
            rope = rope[..., selection.positions(), :]  # (N, d) -> (B, k + r, d), mixed: (L, h, N, d) -> (L, h, B, ...)
            embeds["rope_embeds"] = rope.transpose(1, 2) if self.rope_is_mixed else rope.unsqueeze(1)
        return embeds


class CollapsedCait(CollapsedTimm):
    """`Cait`: patches are dropped after the position embedding; the class token comes after the last block."""

    _before_norm = ("indices",)

    @classmethod
    def why_no_area_bias(cls, model: nn.Module) -> str:
        return "its talking heads mix the logits of attention, and take no mask"

    def _attach(self) -> None:
        sparse_patch_embed(self.patch_embed, self.carrier)
        keep_after(self.pos_drop, self.carrier, 0)

    def _patch_positions(self, grid: tuple[int, int]) -> Tensor:
        return self.pos_embed

    def forward_intermediates(
        self,
        x: Tensor,
        indices=None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        *,
        order: Order | None = None,
    ):
        """As `CollapsedTimm`'s; Cait has no prefix tokens to return."""
        return super().forward_intermediates(
            x,
            indices,
            norm=norm,
            stop_early=stop_early,
            output_fmt=output_fmt,
            intermediates_only=intermediates_only,
            order=order,
        )


class KeptBias(NamedTuple):
    """What a Beit block gets instead of the shared relative position bias while patches are dropped.

    It is an argument, not a state, so that a checkpointed block finds it again in the backward pass.
    """

    index: Tensor
    """(B, n) long: the row of each token in the bias of the whole grid; 0 is the class token."""
    shared: Tensor | None
    """What is added to the logits of all blocks, broadcast to (B, heads, n, n); None: nothing is."""


def pair_bias(table: Tensor, pairs: Tensor, index: Tensor) -> Tensor:
    """Relative position bias of each image's own tokens.

    Args:
        table: (distances, heads).
        pairs: (1 + N, 1 + N) long: the row of the table for each pair of tokens.
        index: (B, n) long: the tokens.

    Returns:
        (B, heads, n, n).
    """
    return table[pairs[index.unsqueeze(2), index.unsqueeze(1)]].permute(0, 3, 1, 2)


class KeptAttention(Attention):
    """Beit's attention, that gathers its relative position bias for the kept patches."""

    carrier: Carrier  # its own: from `forward` to `_get_rel_pos_bias`

    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | KeptBias | None = None) -> Tensor:
        if not isinstance(shared_rel_pos_bias, KeptBias):
            return super().forward(x, shared_rel_pos_bias)
        index, shared = shared_rel_pos_bias
        return self.carrier.run(index, super().forward, x, shared)

    def _get_rel_pos_bias(self) -> Tensor:
        index = self.carrier.selection
        if index is None:
            return super()._get_rel_pos_bias()
        return pair_bias(self.relative_position_bias_table, self.relative_position_index, index)


class KeptSharedBias(RelativePositionBias):
    """Beit's shared relative position bias, for the kept patches."""

    carrier: Carrier

    def forward(self) -> Tensor | KeptBias:
        selection = self.carrier.selection
        if selection is None:
            return super().forward()
        index, areas = kept_index(selection), selection.key_bias
        pairs = pair_bias(self.relative_position_bias_table, self.relative_position_index, index)
        return KeptBias(index, pairs if areas is None else pairs + areas)


class NoSharedBias(nn.Module):
    """Where a Beit has no shared bias: tells its blocks which patches are kept."""

    def __init__(self, carrier: Carrier):
        super().__init__()
        self.carrier = carrier

    def forward(self) -> KeptBias | None:
        selection = self.carrier.selection
        return None if selection is None else KeptBias(kept_index(selection), selection.key_bias)

    def set_window_size(self, window_size: tuple[int, int]) -> None:
        pass  # there is no table to resize


def kept_index(selection: Selection) -> Tensor:
    """(B, 1 + k + r) long: the class token, then the patch whose position each token has."""
    return nn.functional.pad(selection.positions() + 1, (1, 0))


class CollapsedBeit(CollapsedTimm):
    """`Beit`: its relative position bias is gathered for each image's kept patches.

    A token of the remainder has the relative position of the patch at the centre of what it stands for.
    """

    _takes_mask = False  # the area bias is added to the relative position bias

    def _attach(self) -> None:
        sparse_patch_embed(self.patch_embed, self.carrier)
        keep_after(self.pos_drop, self.carrier, self.num_prefix_tokens)
        for block in self.blocks:
            become(block.attn, KeptAttention)
            block.attn.carrier = Carrier()
        if isinstance(self.rel_pos_bias, RelativePositionBias):
            become(self.rel_pos_bias, KeptSharedBias)
            self.rel_pos_bias.carrier = self.carrier
        else:
            self.rel_pos_bias = NoSharedBias(self.carrier)

    def _patch_positions(self, grid: tuple[int, int]) -> Tensor | None:
        return None if self.pos_embed is None else self.pos_embed[:, self.num_prefix_tokens :]
