"""Collapsed models of timm: what its families share, and ViT and Eva; others are in `timm_families`, `timm_cells`."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from timm.layers import AttentionPoolLatent, resample_abs_pos_embed
from torch import Tensor, nn

from ..models.transformer import gather_tokens, scatter_tokens
from ..order import CollapseError, Order, resolve_keep
from ..order.errors import describe
from .base import Collapsed, check_area_bias
from .classes import become
from .selection import Carrier, KeepPatches, Selection, area_key_bias, image_size, sparse_patch_embed, spread_kept


class AreaPool(AttentionPoolLatent):
    """timm's pooling by attention, with the bias of the keys that its carrier holds; made by swapping the class."""

    carrier: Carrier

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        bias = self.carrier.selection
        return super().forward(x, attn_mask if bias is None else bias[..., -x.shape[1] :].to(x.dtype))


class CollapsedTimm(Collapsed):
    """What the timm families share: `forward_features`, `forward_intermediates`, `forward_head` and a patch embedding.

    Where there is an area bias, ViT's blocks are not recomputed by gradient checkpointing: timm does not while it has
    a mask.
    """

    _before_norm = ("indices", "return_prefix_tokens")  # arguments of forward_intermediates between images and `norm`
    _takes_mask = True  # whether forward_features and forward_intermediates have `attn_mask`

    def _attach(self) -> None:
        if isinstance(pool := getattr(self, "attn_pool", None), AttentionPoolLatent):
            become(pool, AreaPool)
            pool.carrier = Carrier()

    @classmethod
    def why_no_area_bias(cls, model: nn.Module) -> str:
        if why := super().why_no_area_bias(model) or why_no_area_pool(model):
            return why
        blocks = [type(block).__name__ for block in model.blocks if not takes_mask(block)] if cls._takes_mask else []
        return f"its {blocks[0]} takes no attention mask" if blocks else ""

    def image_grid(self, images: Tensor) -> tuple[int, int]:
        if not isinstance(images, Tensor) or images.ndim != 4:
            raise CollapseError(f"images must be a tensor of shape (B, C, H, W), got {describe(images)}")
        embed, size = self.patch_embed, image_size(images)
        strict = getattr(embed, "strict_img_size", True)
        if strict and embed.img_size is not None and size != tuple(embed.img_size):
            raise CollapseError(
                f"images must be {tuple(embed.img_size)} pixels, the model's img_size, got {size}; "
                "set_input_size changes it, dynamic_img_size=True lifts it"
            )
        if strict:
            return tuple(embed.grid_size)
        if not embed.dynamic_img_pad and any(side % patch for side, patch in zip(size, self._patch_size())):
            raise CollapseError(f"images must have sides that are multiples of {self._patch_size()}, got {size}")
        grid = tuple(embed.dynamic_feat_size(size))
        if not getattr(self, "dynamic_img_size", False) and grid != tuple(embed.grid_size):
            raise CollapseError(
                f"images must have the patch grid of the model's positions, {tuple(embed.grid_size)}, got {grid}; "
                "set_input_size changes it, dynamic_img_size=True lifts it"
            )
        return grid

    def _patch_size(self) -> tuple[int, int]:
        return tuple(self.patch_embed.feat_ratio(as_scalar=False))

    def _embed_patches(self, images: Tensor) -> Tensor:
        embed = self.patch_embed
        return embed.norm(embed.proj(images).flatten(2).transpose(1, 2))

    def _patch_positions(self, grid: tuple[int, int]) -> Tensor | None:
        if self.pos_embed is None:
            return None
        prefix = 0 if self.no_embed_class else self.num_prefix_tokens
        positions = self.pos_embed
        if self.dynamic_img_size:
            positions = resample_abs_pos_embed(positions, grid, self.patch_embed.grid_size, num_prefix_tokens=prefix)
        return positions[:, prefix:]

    def forward(self, x: Tensor, *args, order: Order | None = None, **kwargs) -> Tensor:
        """As the plain model's; `order` takes the place of the orderer's."""
        selection = self.select(x, order)
        features = self._features(selection, x, *args, **kwargs)
        if selection is None:
            return super().forward_head(features)
        return self.carrier.run(selection, self.forward_head, features)

    def forward_features(self, x: Tensor, *args, order: Order | None = None, **kwargs) -> Tensor:
        """Tokens (B, prefix + k + r, D): the kept patches in the order of their positions, then the remainder's.

        Raises:
            CollapseError: An order of another batch or grid, images of another size, or, while patches are dropped,
                `attn_mask` or `is_causal`.
        """
        return self._features(self.select(x, order), x, *args, **kwargs)

    def _features(self, selection: Selection | None, x: Tensor, *args, **kwargs) -> Tensor:
        if selection is not None:
            self._refuse_arguments(args, kwargs)
            args, kwargs = (), self._with_bias(selection, kwargs)
        return self.carrier.run(selection, super().forward_features, x, *args, **kwargs)

    def _with_bias(self, selection: Selection, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments of the plain methods: all masks were refused, and the area bias is one."""
        if selection.key_bias is None or not self._takes_mask:
            return kwargs
        return {**kwargs, "attn_mask": selection.key_bias}

    def forward_intermediates(
        self,
        x: Tensor,
        indices=None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        *args,
        order: Order | None = None,
        **kwargs,
    ):
        """As the plain model's: intermediates lie on the whole grid, whichever patches are kept.

        Dropped places hold the remainder's token that stands for them, or 0 without a remainder. The final features
        are those of `forward_features`: the kept tokens.
        """
        selection, plain = self.select(x, order), super().forward_intermediates
        given = {"indices": indices, "return_prefix_tokens": return_prefix_tokens}
        which = [given.get(name) for name in self._before_norm]
        if selection is None:
            return plain(x, *which, norm, stop_early, output_fmt, intermediates_only, *args, **kwargs)
        self._refuse_arguments((), kwargs)
        if args or kwargs.get("output_dict"):
            raise CollapseError("output_dict must be False while patches are dropped, got True")
        if output_fmt not in ("NCHW", "NLC"):
            raise CollapseError(f"output_fmt must be NCHW or NLC, got {output_fmt!r}")
        kwargs = self._with_bias(selection, kwargs)
        result = self.carrier.run(selection, plain, x, *which, norm, stop_early, "NLC", intermediates_only, **kwargs)

        def dense(entry):
            if isinstance(entry, tuple):
                return dense(entry[0]), entry[1]
            entry = to_grid(entry, selection)
            return entry if output_fmt == "NLC" else entry.mT.unflatten(2, selection.grid)

        if intermediates_only:
            return [dense(entry) for entry in result]
        return result[0], [dense(entry) for entry in result[1]]

    def forward_head(self, x: Tensor, *args, **kwargs) -> Tensor:
        """As the plain model's; with an area bias, pooled tokens count for the patches they stand for.

        In a mean, a token's weight is its area to the power of `area_bias`, which is attention with equal logits.

        Raises:
            CollapseError: The tokens' areas are not known: called by itself, with an area bias, on a model of images of
                any size or with areas that differ from image to image.
        """
        head, areas = super().forward_head, self._areas_in_head(x)
        if areas is None:
            return head(x, *args, **kwargs)
        if getattr(self, "attn_pool", None) is not None:
            bias = area_key_bias(areas, self.area_bias, x.shape[1] - areas.shape[1])
            return self.attn_pool.carrier.run(bias, head, x, *args, **kwargs)
        weights = nn.functional.pad(areas**self.area_bias, (x.shape[1] - areas.shape[1], 0), value=1.0)
        counted = weights if getattr(self, "pool_include_prefix", False) else weights[:, self.num_prefix_tokens :]
        return head(x * (weights / counted.mean(1, keepdim=True)).unsqueeze(-1).to(x.dtype), *args, **kwargs)

    def _areas_in_head(self, x: Tensor) -> Tensor | None:
        """(1 or B, r): the areas of the last tokens of x, where the head pools tokens by area."""
        if self.area_bias == 0:
            return None
        check_area_bias(self.area_bias, why_no_area_pool(self))  # the head may be another since it was set
        if self.global_pool != "avg" and getattr(self, "attn_pool", None) is None:
            return None
        if (selection := self.carrier.selection) is not None:
            return selection.areas
        if self.keep == 1 or self.remainder == "none":
            return None
        any_size = not hasattr(self, "patch_embed") or getattr(self, "dynamic_img_size", False)
        grid = None if any_size else tuple(self.patch_embed.grid_size)
        if grid is not None and (budget := resolve_keep(self.keep, grid[0] * grid[1])) == grid[0] * grid[1]:
            return None
        plan = None if grid is None else self.plan(budget, grid)
        if plan is None or plan.areas_vary:
            unknown = "grid of images of any size" if plan is None else "areas, which differ from image to image"
            raise CollapseError(
                f"area_bias must be 0 where forward_head is called by itself, got {self.area_bias}: it cannot know the "
                f"{unknown}; call the model"
            )
        areas = plan.areas(x.device)
        fits = areas is not None and x.shape[1] == self.num_prefix_tokens + plan.num_kept + areas.shape[1]
        return areas if fits else None  # others are of a forward pass with all patches

    def _refuse_arguments(self, args: tuple, kwargs: dict[str, Any]) -> None:
        """Raises CollapseError for arguments that have no meaning while patches are dropped: attention masks."""
        attn_mask = kwargs.get("attn_mask", args[0] if args else None)
        is_causal = kwargs.get("is_causal", args[1] if len(args) > 1 else False)
        if attn_mask is not None:
            raise CollapseError(
                f"attn_mask must be None while patches are dropped (keep={self.keep}): it is laid out for all patches, "
                f"got {describe(attn_mask)}"
            )
        if is_causal:
            raise CollapseError(f"is_causal must be False while patches are dropped (keep={self.keep}), got True")


class CollapsedVit(CollapsedTimm):
    """`VisionTransformer` and `VisionTransformerDistilled`.

    Where the patch embedding allows it, only the kept patches ever become tokens: time and memory do not grow with the
    patches that there are. Else `patch_drop`, which follows the position embedding, keeps them.
    """

    def _attach(self) -> None:
        super()._attach()
        if sparse_patch_embed(self.patch_embed, self.carrier, compact=True):
            self.patch_drop = nn.Identity()
        else:
            self.patch_drop = KeepPatches(self.carrier, self.num_prefix_tokens)

    def _pos_embed(self, x: Tensor) -> Tensor:
        """As timm's, for the kept patches (B, k, D), to which the remainder's tokens are appended."""
        selection = self.carrier.selection
        if selection is None or not getattr(self.patch_embed, "compact", False):
            return super()._pos_embed(x)
        tokens = (self.cls_token, getattr(self, "reg_token", None), getattr(self, "dist_token", None))
        prefix = [token.expand(x.shape[0], -1, -1) for token in tokens if token is not None]
        positions = self._patch_positions(selection.grid)
        if positions is not None:
            x = x + nn.functional.embedding(selection.kept, positions[0])
            if prefix and not self.no_embed_class:
                prefix = [torch.cat(prefix, 1) + self.pos_embed[:, : self.num_prefix_tokens]]
        return selection.append_extra(self.pos_drop(torch.cat([*prefix, x], 1)))


class CollapsedEva(CollapsedTimm):
    """`Eva`: as ViT; its rotary embedding follows the positions that `patch_drop` returns."""

    def _attach(self) -> None:
        super()._attach()
        sparse_patch_embed(self.patch_embed, self.carrier)
        self.patch_drop = KeepPatches(self.carrier, self.num_prefix_tokens, with_positions=True)


def why_no_area_pool(model: nn.Module) -> str:
    """Why a model's head cannot count tokens by their areas; empty where it can, or pools none."""
    pool = getattr(model, "attn_pool", None)
    if model.global_pool == "avgmax" or type(pool) not in (type(None), AttentionPoolLatent, AreaPool):
        return f"its pooling, {model.global_pool}, cannot count tokens by their areas"
    return ""


def takes_mask(block: nn.Module) -> bool:
    """Whether a block, and the attention in it, have an argument `attn_mask`."""
    modules = [block, *(m for name, m in block.named_children() if name == "attn")]
    return all("attn_mask" in inspect.signature(module.forward).parameters for module in modules)


def to_grid(tokens: Tensor, selection: Selection) -> Tensor:
    """Dense features: (B, k + r, D) -> (B, N, D), kept tokens at their places.

    Dropped places take the extra token that stands for them, or 0 where there are none.
    """
    b, k = selection.kept.shape
    if selection.cover is None:
        return spread_kept(tokens, selection)
    dense = gather_tokens(tokens[:, k:], selection.cover().expand(b, -1))
    return scatter_tokens(tokens[:, :k], selection.kept, dense)
