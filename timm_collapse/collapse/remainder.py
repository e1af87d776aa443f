"""What stands for the patches that a collapsed ViT drops: nothing, their mean, the image at low resolution, or a mix.

A plan says, for one token budget, how much of the order counts and which tokens there are; `plan_remainder` makes it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ..models.tokenizer import resize_images
from ..models.transformer import gather_tokens
from ..order import Order
from ..order.constants import constant
from .cells import (
    cell_centres,
    cell_of_patches,
    coarse_grid,
    interval_shares,
    mean_of_cells,
    sum_of_cells,
    weighted_axes,
)
from .pyramid import choose_leaves, count_leaves, cover_of_leaves, plan_splits, pyramid_shapes, split_shapes
from .selection import Selection
from .zoom import LATEST, axis_edges, interval_of_parts, pairs_of, places_of_intervals, resample_axes, zoom_densities

REMAINDERS = ("none", "fused", "coarse", "mixed", "split", "zoom")

DEFAULT_REMAINDER = ("split", 0.5)
"""With its area bias: the best of them on a frozen ViT at 12% to 50% of the tokens (docs/results.md, real_vit)."""

OF_CELLS = ("mixed", "split", "zoom")
"""Remainders where the order decides on cells: nothing is unseen, so what patches tell of each other counts less."""

LEAST_PLACES = 0.22
"""Share of the patches whose places tell which cells to split: an order may begin with a spread, which says little."""

Embed = Callable[[Tensor], Tensor]
"""(B, C, h p, w q) -> (B, h w, D): patch embedding of images of any size, without positions."""
Positions = Callable[[], Tensor | None]
"""Gives what is added to the embeddings of the whole grid, (1, N, D); None: nothing is."""


class Plan:
    """What the tokens of a budget are. This one: the first patches of the order, and nothing for the others.

    Args:
        budget: Tokens.
        grid: Patches (h, w).
        patch_size: Their sides in pixels.

    Attributes:
        places: So many first places of the order decide; 0: no order is needed.
        num_kept: So many patches are kept.
        sizes: (tokens, patches that each stands for), of the extra tokens behind them in turn.
        areas_vary: These differ from image to image, and only a selection knows them.
    """

    sizes: tuple[tuple[int, float], ...] = ()
    areas_vary = False

    def __init__(self, budget: int, grid: tuple[int, int], patch_size: tuple[int, int]):
        self.places = self.num_kept = budget
        self.grid, self.patch_size = grid, patch_size

    def select(self, order: Order | None, images: Tensor, embed: Embed, positions: Positions) -> Selection:
        """What a batch of images becomes.

        Args:
            order: Of the images; None where `places` is 0.
            images: (B, C, h p, w q).
            embed: Patch embedding, without positions.
            positions: Position embedding.
        """
        if order is None:
            return Selection(torch.empty(images.shape[0], 0, dtype=torch.long, device=images.device), self.grid)
        return Selection(order.first(self.places), self.grid)

    def detailed(self, order: Order) -> Tensor:
        """(B, N), in [0, 1]: the share of each patch that is seen at the finest resolution."""
        return (order.ranks < self.places).float()

    def with_cells(self, first: Selection, tokens: Tensor, cells: tuple[int, int]) -> Selection:
        """A selection whose extra tokens are the cells of a coarse grid."""
        device = first.kept.device
        places = constant(cell_centres, first.grid, cells, device=device)
        cover = partial(constant, cell_of_patches, first.grid, cells, device=device)
        return first._replace(extra=tokens, places=places, cover=cover, areas=self.areas(device))

    def areas(self, device: torch.device) -> Tensor | None:
        """(1, r): how many patches each extra token stands for; None: there are none."""
        return constant(areas_of, self.sizes, device=device) if self.sizes else None


class Fused(Plan):
    """One token is the mean of the dropped patches' embeddings."""

    def __init__(self, budget: int, grid: tuple[int, int], patch_size: tuple[int, int]):
        super().__init__(budget, grid, patch_size)
        self.fuses = budget > 1
        if self.fuses:
            self.places = self.num_kept = budget - 1
            self.sizes = ((1, grid[0] * grid[1] - self.num_kept),)

    def select(self, order: Order | None, images: Tensor, embed: Embed, positions: Positions) -> Selection:
        first = super().select(order, images, embed, positions)
        if not self.fuses:
            return first
        tokens = embed(mean_dropped_patch(images, first.kept, self.grid, self.patch_size))
        if (added := positions()) is not None:
            weights = dropped_weights(first.kept, self.grid[0] * self.grid[1], tokens.dtype).unsqueeze(1)
            tokens = tokens + weights @ added.to(tokens.dtype)
        return self.with_cells(first, tokens, (1, 1))


class Coarse(Plan):
    """Some tokens are the whole image at low resolution: at most a share of the budget."""

    def __init__(self, budget: int, grid: tuple[int, int], patch_size: tuple[int, int], share: float):
        super().__init__(budget, grid, patch_size)
        self.cells = coarse_grid(int(budget * share + 1e-6), grid)
        if self.cells is not None:
            count = self.cells[0] * self.cells[1]
            self.places = self.num_kept = 0 if share == 1 else budget - count
            self.sizes = ((count, grid[0] * grid[1] / count),)

    def select(self, order: Order | None, images: Tensor, embed: Embed, positions: Positions) -> Selection:
        first = super().select(order, images, embed, positions)
        if self.cells is None:
            return first
        tokens = coarse_tokens(images, self.grid, self.cells, self.patch_size, embed, positions())
        return self.with_cells(first, tokens, self.cells)


class Mixed(Plan):
    """A pyramid of patches: small ones where the order comes early, ever larger ones elsewhere, each one token."""

    def __init__(self, budget: int, grid: tuple[int, int], patch_size: tuple[int, int], share: float):
        super().__init__(budget, grid, patch_size)
        self.shapes = self.levels(budget, grid, share)
        self.splits = plan_splits(budget, self.shapes)
        self.first = int(self.shapes[0] == grid)  # of the levels whose cells are extra tokens; the finest are patches
        counts = count_leaves(self.shapes, self.splits)
        self.num_kept = counts[0] if self.first else 0
        areas = (grid[0] * grid[1] / (h * w) for h, w in self.shapes)
        self.sizes = tuple(zip(counts, areas, strict=True))[self.first :]
        # cells go by the mean rank of all their patches; where patches that come late would stand is worth a guess
        n = grid[0] * grid[1]
        self.places = min(max(budget, round(LEAST_PLACES * n)), n) if self.splits[-1] else 0

    @staticmethod
    def levels(budget: int, grid: tuple[int, int], share: float) -> list[tuple[int, int]]:
        """Grids of the cells, finest first."""
        return pyramid_shapes(budget, grid, share)

    def select(self, order: Order | None, images: Tensor, embed: Embed, positions: Positions) -> Selection:
        if order is None:  # nothing is split
            scores = torch.zeros(images.shape[0], self.grid[0] * self.grid[1], device=images.device)
            order = Order.unchecked(scores, self.grid)
        leaves = choose_leaves(order, self.shapes, self.splits)
        kept = leaves[0] if self.first else leaves[0][:, :0]
        leaves = leaves[self.first :]
        extra, places, added = [], [], positions()
        for shape, leaf in zip(self.shapes[self.first :], leaves, strict=True):
            tokens = coarse_tokens(images, self.grid, shape, self.patch_size, embed, added)
            extra.append(gather_tokens(tokens, leaf))
            places.append(constant(cell_centres, self.grid, shape, device=images.device)[0][leaf])
        cover, areas = partial(self.cover, leaves), self.areas(images.device)
        return Selection(kept, self.grid, torch.cat(extra, 1), torch.cat(places, 1), cover, areas=areas)

    def detailed(self, order: Order) -> Tensor:
        fine = choose_leaves(order, self.shapes, self.splits)[0]
        h, w = self.shapes[0]
        cells = torch.zeros(len(fine), h * w, device=fine.device).scatter(1, fine, 1.0)
        return sum_of_cells(cells.unsqueeze(2), self.grid, (h, w)).squeeze(2)

    def cover(self, leaves: list[Tensor]) -> Tensor:
        """(B, N) long: the extra token that stands for each patch."""
        cover = cover_of_leaves(leaves, self.shapes)
        if self.first:
            return cover
        return cover[:, constant(cell_of_patches, self.grid, self.shapes[0], device=cover.device)[0]]


class Split(Mixed):
    """Cells of two sizes on any grid: the image downscaled, and four tokens for one where the order comes early."""

    levels = staticmethod(split_shapes)


class Zoom(Plan):
    """The image downscaled on a grid whose rows and columns are narrow where the order comes early, see `zoom`."""

    areas_vary = True

    def __init__(self, budget: int, grid: tuple[int, int], patch_size: tuple[int, int], share: float):
        super().__init__(budget, grid, patch_size)
        self.share, self.cells = share, coarse_grid(budget, grid)
        self.places, self.num_kept = round(LATEST * grid[0] * grid[1]), 0

    def select(self, order: Order | None, images: Tensor, embed: Embed, positions: Positions) -> Selection:
        densities, (h, w) = zoom_densities(order, self.share), self.cells
        size = h * self.patch_size[0], w * self.patch_size[1]
        tokens, added = embed(resample_axes(images, densities, size)), positions()
        edges = tuple(map(axis_edges, densities, self.cells))
        if added is not None:
            shares = tuple(map(interval_shares, edges, self.grid))
            tokens = tokens + weighted_axes(added.float(), self.grid, shares).to(tokens.dtype)
        rows, columns = (edge.diff() for edge in edges)
        return (
            super()
            .select(None, images, embed, positions)
            ._replace(
                extra=tokens,
                places=pairs_of(*map(places_of_intervals, edges), self.grid[1]),
                cover=lambda: pairs_of(*map(interval_of_parts, edges, self.grid), w),
                areas=(rows.unsqueeze(2) * columns.unsqueeze(1)).flatten(1),
            )
        )


def plan_remainder(
    remainder: str, budget: int, grid: tuple[int, int], patch_size: tuple[int, int], share: float
) -> Plan:
    """The plan of a remainder, one of REMAINDERS, see `Collapsed`."""
    if remainder == "fused":
        return Fused(budget, grid, patch_size)
    if remainder == "coarse":
        return Coarse(budget, grid, patch_size, share)
    if remainder == "mixed":
        return Mixed(budget, grid, patch_size, share)
    if remainder == "split":
        return Split(budget, grid, patch_size, share)
    if remainder == "zoom":
        # evenly: no order is needed
        return Coarse(budget, grid, patch_size, share) if share == 1 else Zoom(budget, grid, patch_size, share)
    return Plan(budget, grid, patch_size)


def coarse_tokens(
    images: Tensor,
    grid: tuple[int, int],
    cells: tuple[int, int],
    patch_size: tuple[int, int],
    embed: Embed,
    positions: Tensor | None,
) -> Tensor:
    """(B, c, D): the whole image at one patch a cell, each with the mean of the positions that it covers."""
    tokens = embed(resize_images(images, (cells[0] * patch_size[0], cells[1] * patch_size[1])))
    return tokens if positions is None else tokens + mean_of_cells(positions.to(tokens.dtype), grid, cells)


def default_orderer(
    remainder: str | None, patches: str = "collapse_ranker_tiny_224", cells: str = "collapse_ranker_cells_224"
) -> str:
    """The bundled orderer for a remainder: that of cells or that of patches; None is DEFAULT_REMAINDER's."""
    return cells if (remainder or DEFAULT_REMAINDER[0]) in OF_CELLS else patches


def areas_of(sizes: tuple[tuple[int, float], ...]) -> Tensor:
    """(1, r) of (tokens, patches that each stands for)."""
    return torch.cat([torch.full((1, count), float(area)) for count, area in sizes], 1)


def mean_dropped_patch(images: Tensor, kept: Tensor, grid: tuple[int, int], patch_size: tuple[int, int]) -> Tensor:
    """The mean of the dropped patches' pixels, (B, C, p, q): embedding is linear, so it embeds to their mean token."""
    b, c = images.shape[:2]
    patches = images.reshape(b, c, grid[0], patch_size[0], grid[1], patch_size[1])
    dropped = dropped_weights(kept, grid[0] * grid[1], images.dtype).view(b, *grid)
    return torch.einsum("bchpwq,bhw->bcpq", patches, dropped)


def dropped_weights(kept: Tensor, num_patches: int, dtype: torch.dtype) -> Tensor:
    """(B, N): 1 / (N - k) for dropped patches, 0 for kept ones."""
    ones = torch.ones(kept.shape[0], num_patches, dtype=dtype, device=kept.device)
    return ones.scatter(1, kept, 0.0) / (num_patches - kept.shape[1])
