"""The patches of one forward pass, and how the parts of a collapsed model come to know of them.

What only some families need is in their files.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from timm.layers import Format, PatchEmbed
from torch import Tensor, nn

from ..models.transformer import gather_tokens, scatter_tokens
from ..order import CollapseError
from ..order.errors import describe
from .classes import become, on_hand


class Selection(NamedTuple):
    """What becomes of the patches of a batch of images; made once a forward pass, by `Collapsed.select`."""

    kept: Tensor
    """(B, k) long: the numbers of the kept patches, ascending; where cells are kept, one cell after the other."""
    grid: tuple[int, int]
    """Patches (h, w) of the images."""
    extra: Tensor | None = None
    """(B, r, D): tokens that stand for the remainder, appended to the kept ones; None: there are none."""
    places: Tensor | None = None
    """(1 or B, r) long: the patch at the centre of what each extra token stands for (its rotary position)."""
    cover: Callable[[], Tensor] | None = None
    """Gives (1 or B, N) long, the extra token that stands for each patch, where it is dropped."""
    cell: int = 1
    """Patches on a side of the cells that are kept whole, each with its patches row by row; 1: single patches are."""
    areas: Tensor | None = None
    """(1 or B, r) float32: how many patches each extra token stands for."""
    key_bias: Tensor | None = None
    """(1 or B, 1, 1, prefix + k + r): added to the attention logits of each token as a key; None: nothing is."""

    def apply(self, x: Tensor, num_prefix_tokens: int = 0) -> Tensor:
        """(B, prefix + N, D) -> (B, prefix + k + r, D)."""
        parts = [x[:, :num_prefix_tokens], gather_tokens(x[:, num_prefix_tokens:], self.kept)]
        return self.append_extra(torch.cat(parts, 1))

    def append_extra(self, x: Tensor) -> Tensor:
        """(B, prefix + k, D) -> (B, prefix + k + r, D)."""
        return x if self.extra is None else torch.cat([x, self.extra.to(x.dtype)], 1)

    def sized(self, size_embed: Tensor) -> Selection:
        """The same with a size embedding (2, D) added to the extra tokens, see `Collapsed`; there are `areas`."""
        base, slope = size_embed.to(self.extra.dtype)
        return self._replace(extra=self.extra + base + self.areas.log().unsqueeze(2).to(self.extra.dtype) * slope)

    def biased(self, area_bias: float, num_prefix_tokens: int) -> Selection:
        """The same with a bias on attention, see `Collapsed.area_bias`; there are `areas`."""
        bias = area_key_bias(self.areas, area_bias, num_prefix_tokens + self.kept.shape[1])
        return self._replace(key_bias=bias.to(self.extra.dtype))

    def positions(self) -> Tensor:
        """(B, k + r) long: the patch whose rotary position each token has."""
        if self.places is None:
            return self.kept
        return torch.cat([self.kept, self.places.expand(self.kept.shape[0], -1)], 1)


def area_key_bias(areas: Tensor, area_bias: float, ahead: int) -> Tensor:
    """(B, 1, 1, ahead + r): area_bias log(area) of each extra token (B, r), and 0 for the tokens ahead of them.

    With an `area_bias` of 1, attention is what it would be over as many copies of the token: ToMe's
    proportional attention (arXiv 2210.09461).
    """
    return nn.functional.pad(area_bias * areas.log(), (ahead, 0))[:, None, None]


class Carrier(threading.local):
    """Brings the selection from a model's forward method to the parts inside that drop tokens.

    timm and transformers call these parts with the images or tokens alone, through methods that are not ours, so the
    selection cannot be their argument in every family. A thread-local attribute is the one way that holds everywhere:

    - each thread has its own, and a nested or failed pass restores the outer one;
    - `torch.compile` (fullgraph) traces reading and setting it, which it refuses for a `ContextVar`;
    - `torch.export` and `torch.jit.trace` run it as it is;
    - blocks that are recomputed in the backward pass need none: all that they use comes in their arguments.

    A model and its parts share one; a copy of the model has its own.

    Attributes:
        selection: That of this thread's forward pass (in Beit's attention: the index of its tokens, in pooling by
            attention: the bias of its keys); None outside of one, and where all patches are kept.
    """

    selection: Selection | Tensor | None

    def __init__(self):
        # in each thread; an attribute of the class would be none of the instance's until the first pass, and a graph
        # that is compiled again (for another batch) within a pass would miss the guard that the first one wrote
        self.selection = None

    def run(self, selection: Selection | Tensor | None, function: Callable, *args, **kwargs) -> Any:
        """Call a function; while it runs, the parts see the selection."""
        outer, self.selection = self.selection, selection
        try:
            return function(*args, **kwargs)
        finally:
            self.selection = outer

    def __reduce__(self):
        return Carrier, ()


class KeepPatches(nn.Module):
    """Takes the place of timm's `patch_drop`: keeps the selected patches and appends the extra tokens.

    Args:
        carrier: The model's.
        num_prefix_tokens: Leading tokens that are always kept.
        with_positions: Also return the positions, as `Eva` expects.
    """

    def __init__(self, carrier: Carrier, num_prefix_tokens: int, with_positions: bool = False):
        super().__init__()
        self.carrier, self.num_prefix_tokens, self.with_positions = carrier, num_prefix_tokens, with_positions

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor | None]:
        selection = self.carrier.selection
        if selection is None:
            return (x, None) if self.with_positions else x
        x = selection.apply(x, self.num_prefix_tokens)
        return (x, selection.positions()) if self.with_positions else x


def embed_kept(conv: nn.Conv2d, images: Tensor, selection: Selection) -> Tensor:
    """What a strided convolution without padding gives for the kept patches, (B, k, D): the others are never read.

    Raises:
        CollapseError: Images of another number of channels.
    """
    (b, c), (p, q), (h, w) = images.shape[:2], conv.stride, selection.grid
    if c != conv.in_channels:
        raise CollapseError(f"images must have {conv.in_channels} channels, as the model's, got {describe(images)}")
    patches = images[..., : h * p, : w * q].reshape(b, c, h, p, w, q).permute(0, 2, 4, 1, 3, 5)
    rows = torch.arange(b, device=images.device).unsqueeze(1)
    patches = patches[rows, selection.kept // w, selection.kept % w].flatten(2)  # (B, k, C p q)
    weight, bias = on_hand(conv, lambda: (conv.weight, conv.bias))
    return nn.functional.linear(patches, weight.flatten(1), bias)


def spread_kept(tokens: Tensor, selection: Selection) -> Tensor:
    """Tokens of the kept patches (B, k, D) in their places of the whole grid (B, N, D), zeros in the others."""
    h, w = selection.grid
    return scatter_tokens(tokens, selection.kept, tokens.new_zeros(tokens.shape[0], h * w, tokens.shape[-1]))


class SparsePatchEmbed(PatchEmbed):
    """timm's `PatchEmbed` that embeds only the selected patches.

    An existing patch embedding becomes one by swapping its class, see `sparse_patch_embed`. Where `compact`, these are
    all that it returns, (B, k, D); else the others are zeros in their places.
    """

    carrier: Carrier
    compact: bool

    def forward(self, x: Tensor) -> Tensor:
        selection = self.carrier.selection
        if selection is None:
            return super().forward(x)
        tokens = self.norm(embed_kept(self.proj, x, selection))
        if self.compact:
            return tokens
        tokens = spread_kept(tokens, selection)
        return tokens if self.flatten else tokens.unflatten(1, selection.grid)


def sparse_patch_embed(embed: nn.Module, carrier: Carrier, compact: bool = False) -> bool:
    """Make a patch embedding skip dropped patches, in place; returns whether it can.

    It can where it is one strided convolution without padding, of tokens in NLC or NHWC layout.
    """
    if type(embed) not in (PatchEmbed, SparsePatchEmbed) or embed.dynamic_img_pad:
        return False
    if not embed.flatten and embed.output_fmt != Format.NHWC:
        return False
    become(embed, SparsePatchEmbed)
    embed.carrier, embed.compact = carrier, compact
    return True


def image_size(images: Tensor) -> tuple[int, int]:
    """Height and width, as numbers where torch.jit.trace would have tensors of them: a graph is made for one size."""
    size = tuple(images.shape[-2:])
    return tuple(map(int, size)) if torch.jit.is_tracing() else size


def fit_images(images: Tensor, grid: tuple[int, int], patch_size: tuple[int, int]) -> Tensor:
    """Images cropped or padded to whole patches, as patch embeddings do, at the right and at the bottom."""
    bottom, right = (n * p - side for n, p, side in zip(grid, patch_size, image_size(images)))
    return images if bottom == right == 0 else nn.functional.pad(images, (0, right, 0, bottom))
