"""Exact CoMAE dependency graphs on grids of any size: the whole image first, then, at a closer look, its kept patches.

A CoMAE has one grid, and its graph costs one encoder pass a patch. Here each patch that comes early is cut out,
enlarged to the CoMAE's image size and gets a graph of its own, and so on: passes and memory are linear in the patches.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from ..order import CollapseError, HierarchicalGraph, Order, check_grid, check_images, hierarchical_pagerank
from ..order.precision import without_autocast
from .comae import CoMAE
from .tokenizer import resize_images

CROPS = 64  # cut out and looked at together


@torch.no_grad()
def hierarchical_dependency(
    model: CoMAE,
    images: Tensor,
    grid: tuple[int, int],
    refine: float = 0.22,
    damping: float = 0.85,
    progress: bool = False,
) -> Tensor | HierarchicalGraph:
    """The dependency graph of the model's grid, refined until it is at least as fine as wanted.

    Args:
        model: Its grid is that of the first level, and each refinement multiplies both sides by it.
        images: (B, C, H, W), normalised, of any size.
        grid: Wanted patch grid (h, w).
        refine: Share of the patches of each level that are looked at closer, those first in the PageRank order so far.
        damping: Of that PageRank.
        progress: Show a bar (on stderr) after 3 s.

    Returns:
        (B, N, N) where the model's own grid is fine enough, else a `HierarchicalGraph`.

    Raises:
        CollapseError: Wrong images, grid or share.
    """
    check_images(images)
    grid = check_grid(grid)
    if not 0 < refine <= 1:
        raise CollapseError(f"refine must be in (0, 1], got {refine}")
    with without_autocast(images):  # places of pixels are too fine for half precision
        return _refined(model, images.float(), grid, refine, damping, progress)


def _refined(
    model: CoMAE, images: Tensor, grid: tuple[int, int], refine: float, damping: float, progress: bool
) -> Tensor | HierarchicalGraph:
    side = model.img_size
    graph: Tensor | HierarchicalGraph = model.dependency(resize_images(images, (side, side)))
    level = model.grid
    while level[0] < grid[0] or level[1] < grid[1]:
        order = Order(hierarchical_pagerank(graph, damping), level)
        cells = order.keep(refine)
        inner = _inner_graphs(model, images, cells, level, progress)
        graph = HierarchicalGraph(graph, cells, inner, level, model.grid)
        level = graph.grid
    return graph


def _inner_graphs(model: CoMAE, images: Tensor, cells: Tensor, grid: tuple[int, int], progress: bool) -> Tensor:
    """(B, k, s, s): the model's graph of each cell (B, k) of the images, cut out and resized."""
    b, k = cells.shape
    # no crop is shrunk by more than this resize does, which is antialiased
    most = tuple(min(size, n * model.img_size) for size, n in zip(images.shape[-2:], grid))
    images = resize_images(images, most)
    graphs = []
    with tqdm(total=b * k, desc="refining", unit="crop", disable=not progress, delay=3, leave=False) as bar:
        for image, row in zip(images, cells, strict=True):
            for some in row.split(CROPS):
                crops = crop_cells(image.expand(len(some), -1, -1, -1), some, grid, model.img_size)
                graphs.append(model.dependency(crops))
                bar.update(len(some))
    return torch.cat(graphs).unflatten(0, (b, k))


def crop_cells(images: Tensor, cells: Tensor, grid: tuple[int, int], size: int) -> Tensor:
    """One cell of each image at another resolution.

    Args:
        images: (B, C, H, W).
        cells: (B,) long, on `grid`, row by row.
        grid: Cells (h, w); they need not be whole pixels.
        size: Side of the result in pixels.

    Returns:
        (B, C, size, size), bilinear.
    """
    (h, w), b = grid, len(images)
    matrix = images.new_zeros(b, 2, 3)
    matrix[:, 0, 0], matrix[:, 1, 1] = 1 / w, 1 / h
    matrix[:, 0, 2] = (2 * (cells % w) + 1).to(images) / w - 1
    matrix[:, 1, 2] = (2 * (cells // w) + 1).to(images) / h - 1
    places = F.affine_grid(matrix, [b, images.shape[1], size, size], align_corners=False)
    return F.grid_sample(images, places, padding_mode="border", align_corners=False)
