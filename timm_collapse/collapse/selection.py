"""What a collapsed ViT does to its tokens: embeds and keeps the selected patches, appends what stands for the others.

Nothing here knows of a model family; `Selection` is the state of one forward pass that the parts share.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from timm.layers import Format, PatchEmbed
from torch import Tensor, nn

from ..models.transformer import gather_tokens, scatter_tokens


class Selection:
    """The patches of one forward pass; empty outside of it.

    Attributes:
        kept: (B, k) long, the numbers of the kept patches, ascending; None: all are.
        extra: (B, r, D): tokens that stand for the remainder, appended to the kept ones; None: there are none.
        places: (1 or B, r) long: the patch at the centre of what each extra token stands for (its rotary position).
        grid: Patches (h, w) of the images.
        cover: Gives (1 or B, N) long, the extra token that stands for each patch, where it is dropped.
    """

    def __init__(self):
        self.clear()

    def clear(self) -> None:
        self.kept: Tensor | None = None
        self.grid: tuple[int, int] | None = None
        self.extra: Tensor | None = None
        self.places: Tensor | None = None
        self.cover: Callable[[], Tensor] | None = None

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
    """timm's `PatchEmbed` that embeds only the selected patches.

    An existing patch embedding becomes one by swapping its class, see `sparse_patch_embed`. Where `compact`, these are
    all that it returns, (B, k, D); else the others are zeros in their places.
    """

    selection: Selection
    compact: bool

    def forward(self, x: Tensor) -> Tensor:
        kept = self.selection.kept
        if kept is None:
            return super().forward(x)
        tokens = self.norm(embed_kept(self.proj, x, kept))
        if self.compact:
            return tokens
        h, w = self.dynamic_feat_size(tuple(x.shape[-2:]))
        tokens = scatter_tokens(tokens, kept, tokens.new_zeros(len(x), h * w, tokens.shape[-1]))
        return tokens if self.flatten else tokens.view(len(x), h, w, -1)


def sparse_patch_embed(embed: nn.Module, selection: Selection, compact: bool = False) -> bool:
    """Make a patch embedding skip dropped patches, in place; returns whether it can.

    It can where it is one strided convolution without padding, of tokens in NLC or NHWC layout.
    """
    if type(embed) not in (PatchEmbed, SparsePatchEmbed) or embed.dynamic_img_pad:
        return False
    if not embed.flatten and embed.output_fmt != Format.NHWC:
        return False
    embed.__class__ = SparsePatchEmbed
    embed.selection, embed.compact = selection, compact
    return True


def fit_images(images: Tensor, grid: tuple[int, int], patch_size: tuple[int, int]) -> Tensor:
    """Images cropped or padded to whole patches, as patch embeddings do, at the right and at the bottom."""
    bottom, right = (n * p - side for n, p, side in zip(grid, patch_size, images.shape[-2:]))
    return images if bottom == right == 0 else nn.functional.pad(images, (0, right, 0, bottom))
