"""What a collapsed ViT does to its tokens: embeds and keeps the best patches, and sums the others up in coarse tokens.

Nothing here knows of a model family; `Selection` is the state of one forward pass that the parts share.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from timm.layers import Format, PatchEmbed
from torch import Tensor, nn

from .tokenizer import resize_images
from .transformer import gather_tokens, scatter_tokens


class Selection:
    """The patches of one forward pass; empty outside of it.

    Attributes:
        kept: (B, k) long, the numbers of the kept patches, ascending; None: all are.
        extra: (B, r, D): tokens that stand for the remainder, appended to the kept ones; None: there are none.
        places: (1, r) long: the patch at the centre of what each extra token stands for (its rotary position).
    """

    def __init__(self):
        self.clear()

    def clear(self) -> None:
        self.kept: Tensor | None = None
        self.extra: Tensor | None = None
        self.places: Tensor | None = None

    def apply(self, x: Tensor, num_prefix_tokens: int = 0) -> Tensor:
        """(B, prefix + N, D) -> (B, prefix + k + r, D); the identity where all patches are kept."""
        if self.kept is None:
            return x
        parts = [x[:, :num_prefix_tokens], gather_tokens(x[:, num_prefix_tokens:], self.kept)]
        if self.extra is not None:
            parts.append(self.extra.to(x.dtype))
        return torch.cat(parts, 1)

    def positions(self) -> Tensor | None:
        """(B, k + r) long: the patch whose rotary position each token has."""
        if self.kept is None or self.places is None:
            return self.kept
        return torch.cat([self.kept, self.places.expand(len(self.kept), -1)], 1)


class KeepPatches(nn.Module):
    """Takes the place of timm's `patch_drop`: keeps the selected patches and appends the extra tokens.

    Args:
        selection: Shared with the model.
        num_prefix_tokens: Leading tokens that are always kept.
        with_positions: Also return the positions, as `Eva` expects.
    """

    def __init__(self, selection: Selection, num_prefix_tokens: int, with_positions: bool = False):
        super().__init__()
        self.selection, self.num_prefix_tokens, self.with_positions = selection, num_prefix_tokens, with_positions

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor | None]:
        kept = self.selection.apply(x, self.num_prefix_tokens)
        return (kept, self.selection.positions()) if self.with_positions else kept


def embed_kept(conv: nn.Conv2d, images: Tensor, kept: Tensor) -> Tensor:
    """What a strided convolution without padding gives for some patches, (B, k, D): the others are never read."""
    (b, c, height, width), (p, q) = images.shape, conv.stride
    h, w = height // p, width // q
    patches = images[..., : h * p, : w * q].reshape(b, c, h, p, w, q).permute(0, 2, 4, 1, 3, 5)
    rows = torch.arange(b, device=images.device).unsqueeze(1)
    patches = patches[rows, kept // w, kept % w].flatten(2)  # (B, k, C p q)
    return nn.functional.linear(patches, conv.weight.flatten(1), conv.bias)


class SparsePatchEmbed(PatchEmbed):
    """timm's `PatchEmbed` that embeds only the selected patches and leaves zeros in the places of the others.

    An existing patch embedding becomes one by swapping its class, see `sparse_patch_embed`.
    """

    selection: Selection

    def forward(self, x: Tensor) -> Tensor:
        kept = self.selection.kept
        if kept is None:
            return super().forward(x)
        h, w = self.dynamic_feat_size(tuple(x.shape[-2:]))
        tokens = self.norm(embed_kept(self.proj, x, kept))
        tokens = scatter_tokens(tokens, kept, tokens.new_zeros(len(x), h * w, tokens.shape[-1]))
        return tokens if self.flatten else tokens.view(len(x), h, w, -1)


def sparse_patch_embed(embed: nn.Module, selection: Selection) -> bool:
    """Make a patch embedding skip dropped patches, in place; returns whether it can.

    It can where it is one strided convolution without padding, of tokens in NLC or NHWC layout.
    """
    if type(embed) not in (PatchEmbed, SparsePatchEmbed) or embed.dynamic_img_pad:
        return False
    if not embed.flatten and embed.output_fmt != Format.NHWC:
        return False
    embed.__class__ = SparsePatchEmbed
    embed.selection = selection
    return True


def coarse_grid(budget: int, grid: tuple[int, int]) -> tuple[int, int] | None:
    """The grid (h, w) of coarse tokens that fills a budget best: at most `budget` cells, nearly the image's aspect.

    Returns:
        The grid with most cells whose cells are at most 1.5 times as long as wide (or the reverse, relative to a
        patch), the squarest of these; None for a budget under 1.
    """
    best = None
    for h in range(1, min(grid[0], budget) + 1):
        for w in range(1, min(grid[1], budget // h) + 1):
            stretch = (grid[0] / h) / (grid[1] / w)
            stretch = max(stretch, 1 / stretch)
            if stretch <= 1.5 or h * w == 1:
                best = max(best or (0,), (h * w, -stretch, (h, w)))
    return best[-1] if best else None


@lru_cache(maxsize=256)
def cell_weights(grid: tuple[int, int], cells: tuple[int, int]) -> Tensor:
    """(c, N): the share of each patch in each coarse cell, by area; rows sum to 1."""

    def overlap(new: int, old: int) -> Tensor:
        edges = torch.arange(new + 1, dtype=torch.float64) * old / new
        patch = torch.arange(old, dtype=torch.float64)
        upper = torch.minimum(edges[1:, None], patch + 1)
        return (upper - torch.maximum(edges[:-1, None], patch)).clamp_min(0) * new / old

    rows, columns = overlap(cells[0], grid[0]), overlap(cells[1], grid[1])
    return torch.einsum("ah,bw->abhw", rows, columns).reshape(cells[0] * cells[1], grid[0] * grid[1]).float()


def cell_centres(grid: tuple[int, int], cells: tuple[int, int]) -> Tensor:
    """(1, c) long: the patch in which the centre of each coarse cell lies."""
    rows = (2 * torch.arange(cells[0]) + 1) * grid[0] // (2 * cells[0])
    columns = (2 * torch.arange(cells[1]) + 1) * grid[1] // (2 * cells[1])
    return (rows[:, None] * grid[1] + columns).reshape(1, -1)


def fit_images(images: Tensor, grid: tuple[int, int], patch_size: tuple[int, int]) -> Tensor:
    """Images cropped or padded to whole patches, as patch embeddings do, at the right and at the bottom."""
    bottom, right = (n * p - side for n, p, side in zip(grid, patch_size, images.shape[-2:]))
    return images if bottom == right == 0 else nn.functional.pad(images, (0, right, 0, bottom))


def coarse_images(images: Tensor, cells: tuple[int, int], patch_size: tuple[int, int]) -> Tensor:
    """The whole image at one patch a coarse cell: (B, C, H, W) -> (B, C, h p, w q)."""
    return resize_images(images, (cells[0] * patch_size[0], cells[1] * patch_size[1]))


def mean_dropped_patch(images: Tensor, kept: Tensor, grid: tuple[int, int], patch_size: tuple[int, int]) -> Tensor:
    """The mean of the dropped patches' pixels, (B, C, p, q): embedding is linear, so it embeds to their mean token."""
    b, c = images.shape[:2]
    patches = images.reshape(b, c, grid[0], patch_size[0], grid[1], patch_size[1])
    dropped = dropped_weights(kept, grid[0] * grid[1], images.dtype).view(b, *grid)
    return torch.einsum("bchpwq,bhw->bcpq", patches, dropped)


def dropped_weights(kept: Tensor, num_patches: int, dtype: torch.dtype) -> Tensor:
    """(B, N): 1 / (N - k) for dropped patches, 0 for kept ones."""
    ones = torch.ones(len(kept), num_patches, dtype=dtype, device=kept.device)
    return ones.scatter(1, kept, 0.0) / (num_patches - kept.shape[1])


def to_grid(tokens: Tensor, kept: Tensor, grid: tuple[int, int], cells: tuple[int, int] | None) -> Tensor:
    """Dense features: (B, k + r, D) -> (B, N, D), kept tokens at their places.

    Dropped places take the coarse token of their cell (`cells` is the grid of the extra tokens, (1, 1) for a fused
    one); where there are no extra tokens, 0.
    """
    b, k = kept.shape
    dense = tokens.new_zeros(b, grid[0] * grid[1], tokens.shape[-1])
    if cells is not None:
        cell = cell_weights(grid, cells).argmax(0).to(tokens.device)
        dense = tokens[:, k:][:, cell]
    return scatter_tokens(tokens[:, :k], kept, dense)
