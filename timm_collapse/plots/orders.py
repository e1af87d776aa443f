"""Pictures of orders and dependency graphs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib.cm import ScalarMappable
from matplotlib.collections import EllipseCollection, LineCollection
from matplotlib.colors import LinearSegmentedColormap, Normalize, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from ..order import CollapseError, Order, check_grid, resolve_keep
from .style import (
    LABEL,
    MAX_IMAGES,
    RANK_COLOURS,
    TICK,
    TITLE,
    blanked,
    colour_bar,
    panels,
    set_title,
    shape_of,
    show_on_grid,
    to_picture,
)

WEIGHT_COLOUR = "#D55E00"


def plot_order(image: Tensor, order: Order, keep: float | int = 0.22, path_patches: int = 64) -> Figure:
    """The order of one image: as circles and a path, as the patches that are kept, and as a map of ranks.

    Args:
        image: (3, H, W) float in [0, 1].
        order: Of this image alone (B = 1).
        keep: Share or number of the patches that the second panel shows, see `resolve_keep`.
        path_patches: The path joins this many first patches in their order; 0 draws none.

    Raises:
        CollapseError: For an image of another shape or range, an order of several images, or a wrong keep.
    """
    picture = to_picture(image)
    if len(order) != 1:
        raise CollapseError(f"order must be of one image, got {len(order)}; take order[i]")
    height, width = order.grid
    n, k = order.num_patches, resolve_keep(keep, order.num_patches)
    ranks = order.ranks[0].cpu().numpy()
    norm = Normalize(0, max(1, n - 1))
    ratio = picture.shape[0] / picture.shape[1]
    figure = Figure(figsize=(12.6, 0.4 + 4 * min(1, max(0.4, ratio))), layout="constrained")
    circles, kept, heat = figure.subplots(1, 3)

    show_on_grid(circles, 0.5 + 0.5 * picture, order.grid)  # paler, so that the dark circles stand out as well
    x, y = np.arange(n) % width + 0.5, np.arange(n) // width + 0.5
    sizes = 0.12 + 0.78 * (1 - ranks / max(1, n - 1))
    late_first = ranks.argsort()[::-1]
    circles.add_collection(
        EllipseCollection(
            *(sizes[late_first], sizes[late_first], np.zeros(n)),  # widths, heights, angles
            units="xy",
            offsets=np.stack([x, y], 1)[late_first],
            offset_transform=circles.transData,
            facecolors=RANK_COLOURS(norm(ranks[late_first])),
            edgecolors="white",
            linewidths=0.4,
        )
    )
    first = order.indices[0, : max(0, path_patches)].cpu().numpy()
    points = np.stack([x, y], 1)[first]
    fade = np.linspace(1, 0, max(1, len(first) - 1))  # the first steps stand out of the tangle that follows
    legs = LineCollection(np.stack([points[:-1], points[1:]], 1), linewidths=0.6 + 1.2 * fade, colors="black")
    legs.set_alpha(0.3 + 0.7 * fade if len(first) > 1 else None)
    circles.add_collection(legs)
    circles.plot(*points[:1].T, "o", markersize=7, markerfacecolor="white", markeredgecolor="black")
    set_title(circles, f"Large = early; path: the first {len(first)}" if len(first) else "Large = early")

    show_on_grid(kept, blanked(picture, order.mask(keep)[0], order.grid), order.grid)
    set_title(kept, f"Kept: {k} of {n} patches ({k / n:.0%})")

    drawn = show_on_grid(heat, ranks.reshape(height, width), order.grid, picture, cmap=RANK_COLOURS, norm=norm)
    set_title(heat, "Rank of each patch")
    colour_bar(figure, drawn, heat, "rank (0 = first)").ax.invert_yaxis()
    return figure


def plot_kept(images: Tensor, order: Order, keep: float | int = 0.22) -> Figure:
    """A batch of images, and below each the patches that are kept.

    Args:
        images: (B, 3, H, W) float in [0, 1].
        order: B orders.
        keep: Share or number of patches, see `resolve_keep`.

    Returns:
        A figure of at most 8 columns; more images continue in further pairs of rows.

    Raises:
        CollapseError: For images of another shape or range, another number of orders, more than 256, or
            a wrong keep.
    """
    if not isinstance(images, Tensor) or images.ndim != 4 or len(images) != len(order):
        raise CollapseError(
            f"images must be (B, 3, H, W), one an order, got {shape_of(images)} and {len(order)} orders"
        )
    if not 1 <= len(images) <= MAX_IMAGES:
        raise CollapseError(f"images must be 1 to {MAX_IMAGES} for one picture, got {len(images)}")
    n, k = order.num_patches, resolve_keep(keep, order.num_patches)
    pairs = -(-len(images) // 8)
    columns = -(-len(images) // pairs)
    panel, ratio = max(1.7, 4.6 / columns), images.shape[2] / images.shape[3]
    size = (max(4.6, columns * panel * min(1, 1 / ratio)), 0.4 + 2 * pairs * panel * min(1, ratio))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(2 * pairs, columns, squeeze=False)
    for ax in axes.flat:
        ax.set_axis_off()
    for i, (image, mask) in enumerate(zip(images, order.mask(keep), strict=True)):
        row, column = 2 * (i // columns), i % columns
        picture = to_picture(image)
        show_on_grid(axes[row, column], picture, order.grid)
        show_on_grid(axes[row + 1, column], blanked(picture, mask, order.grid), order.grid)
    figure.suptitle(f"Images and their {k} kept patches of {n} ({k / n:.0%})", fontsize=TITLE)
    return figure


def plot_dependency(image: Tensor, weights: Tensor, target: int, grid: Sequence[int]) -> Figure:
    """One row of a dependency graph over its image: which patches the target patch depends on.

    Args:
        image: (3, H, W) float in [0, 1]; drawn in pale grey, so that colour is weight alone.
        weights: (N,) finite, at least 0: the influence of every patch on the target.
        target: Number of the target patch, outlined.
        grid: Rows and columns of patches (h, w).

    Raises:
        CollapseError: For an image, weights, target or grid that are none of these.
    """
    picture = to_picture(image)
    height, width = check_grid(grid)
    n = height * width
    values = torch.as_tensor(weights).detach().cpu().float().numpy()
    if values.shape != (n,) or not np.isfinite(values).all() or values.min() < 0:
        raise CollapseError(f"weights must be {n} finite numbers of at least 0, got {shape_of(values)}")
    if not 0 <= target < n:
        raise CollapseError(f"target must be in [0, {n - 1}], got {target}")
    norm = Normalize(0, float(values.max()) or 1.0)
    overlay = np.empty((height, width, 4))
    overlay[..., :3] = to_rgb(WEIGHT_COLOUR)
    overlay[..., 3] = 0.9 * norm(values).reshape(height, width)

    figure = Figure(figsize=(5.4, 4.4), layout="constrained")
    ax = figure.subplots()
    grey = picture @ np.array([0.299, 0.587, 0.114])
    show_on_grid(ax, np.repeat(0.6 + 0.4 * grey[..., None], 3, axis=2), grid)
    show_on_grid(ax, overlay, grid, picture)
    row, column = divmod(int(target), width)
    for colour, line in (("white", 4.5), ("black", 2.0)):
        ax.add_patch(Rectangle((column, row), 1, 1, fill=False, edgecolor=colour, linewidth=line, clip_on=False))
    set_title(ax, f"What the patch at ({row}, {column}) depends on")
    ramp = LinearSegmentedColormap.from_list("weight", ["white", WEIGHT_COLOUR])
    colour_bar(figure, ScalarMappable(norm, ramp), ax, "weight")
    return figure


def plot_class_heatmap(orders: Mapping[str, Order]) -> Figure:
    """Per class a heat map of ranks: one row an image, columns the patches sorted by the mean rank of the class.

    Where the images of a class agree, its map is a smooth ramp; noise along the rows is what depends on the image.

    Args:
        orders: The orders of the images of each class, all on one grid.

    Raises:
        CollapseError: For no class, a class without images, or different grids.
    """
    if not orders or not all(len(order) for order in orders.values()):
        raise CollapseError("orders must hold at least one class, and each class at least one image")
    grids = sorted({order.grid for order in orders.values()})
    if len(grids) != 1:
        raise CollapseError(f"orders must share one grid, got the grids {grids}")
    n = grids[0][0] * grids[0][1]
    norm = Normalize(0, max(1, n - 1))
    axes, figure = panels(len(orders), columns=4, width=3.0, height=2.5)
    for ax, (name, order) in zip(axes, orders.items(), strict=True):
        ranks = order.ranks.cpu()
        columns = ranks.float().mean(0).argsort(stable=True)
        drawn = ax.imshow(ranks[:, columns].numpy(), cmap=RANK_COLOURS, norm=norm, aspect="auto", interpolation="none")
        set_title(ax, str(name))
        ax.tick_params(labelsize=TICK)
        ax.set_xticks([0, n - 1] if n > 1 else [0])
        ax.set_yticks([0, len(order) - 1] if len(order) > 1 else [0])
        if ax.get_subplotspec().is_first_col():
            ax.set_ylabel("image", fontsize=LABEL)
    figure.supxlabel("patches, sorted by the mean rank of the class", fontsize=LABEL)
    colour_bar(figure, drawn, list(axes), "rank (0 = first)").ax.invert_yaxis()
    return figure
