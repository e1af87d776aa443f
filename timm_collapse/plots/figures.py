"""Pictures of orders, dependency graphs, training runs and uncertainty curves.

Every function returns a `matplotlib.figure.Figure` and touches no global state of matplotlib: a notebook shows the
figure, `save` writes it, and nothing needs a display.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import EllipseCollection, LineCollection
from matplotlib.colors import LinearSegmentedColormap, Normalize, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from ..order import CollapseError, Order, check_grid, resolve_keep

# early is bright yellow, late is dark: readable with any colour vision, and in grey
RANK_COLOURS = colormaps["viridis_r"]
LINE_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito
LINE_STYLES = ("-", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))  # each serves one round of the colours; dashes are for random
WEIGHT_COLOUR = "#D55E00"
BLANK = 0.93  # grey level of patches that are not kept
MAX_IMAGES = 256
TITLE, LABEL, TICK = 12, 10, 9  # font sizes in points
SUFFIXES = (".png", ".pdf", ".svg")


def save(figure: Figure, path: str | Path) -> Path:
    """Writes a figure; the suffix decides the format.

    Args:
        figure: Any figure of this module.
        path: Ends in .png (150 dots per inch), .pdf or .svg; the folder must exist.

    Returns:
        The path.

    Raises:
        CollapseError: For another suffix or a missing folder.
        OSError: Where the file cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise CollapseError(f"path must end in {', '.join(SUFFIXES)}, got {str(path)!r}")
    if not path.parent.is_dir():
        raise CollapseError(f"path: the folder {str(path.parent)!r} does not exist")
    figure.savefig(path, dpi=150)
    return path


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
    picture = _picture(image)
    if len(order) != 1:
        raise CollapseError(f"order must be of one image, got {len(order)}; take order[i]")
    height, width = order.grid
    n, k = order.num_patches, resolve_keep(keep, order.num_patches)
    ranks = order.ranks[0].cpu().numpy()
    norm = Normalize(0, max(1, n - 1))
    ratio = picture.shape[0] / picture.shape[1]
    figure = Figure(figsize=(12.6, 0.4 + 4 * min(1, max(0.4, ratio))), layout="constrained")
    circles, kept, heat = figure.subplots(1, 3)

    _show(circles, 0.5 + 0.5 * picture, order.grid)  # paler, so that the dark circles stand out as well
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
    _title(circles, f"Large = early; path: the first {len(first)}" if len(first) else "Large = early")

    _show(kept, blanked(picture, order.mask(keep)[0], order.grid), order.grid)
    _title(kept, f"Kept: {k} of {n} patches ({k / n:.0%})")

    drawn = _show(heat, ranks.reshape(height, width), order.grid, picture, cmap=RANK_COLOURS, norm=norm)
    _title(heat, "Rank of each patch")
    _colour_bar(figure, drawn, heat, "rank (0 = first)").ax.invert_yaxis()
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
        raise CollapseError(f"images must be (B, 3, H, W), one an order, got {_shape(images)} and {len(order)} orders")
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
        picture = _picture(image)
        _show(axes[row, column], picture, order.grid)
        _show(axes[row + 1, column], blanked(picture, mask, order.grid), order.grid)
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
    picture = _picture(image)
    height, width = check_grid(grid)
    n = height * width
    values = torch.as_tensor(weights).detach().cpu().float().numpy()
    if values.shape != (n,) or not np.isfinite(values).all() or values.min() < 0:
        raise CollapseError(f"weights must be {n} finite numbers of at least 0, got {_shape(values)}")
    if not 0 <= target < n:
        raise CollapseError(f"target must be in [0, {n - 1}], got {target}")
    norm = Normalize(0, float(values.max()) or 1.0)
    overlay = np.empty((height, width, 4))
    overlay[..., :3] = to_rgb(WEIGHT_COLOUR)
    overlay[..., 3] = 0.9 * norm(values).reshape(height, width)

    figure = Figure(figsize=(5.4, 4.4), layout="constrained")
    ax = figure.subplots()
    grey = picture @ np.array([0.299, 0.587, 0.114])
    _show(ax, np.repeat(0.6 + 0.4 * grey[..., None], 3, axis=2), grid)
    _show(ax, overlay, grid, picture)
    row, column = divmod(int(target), width)
    for colour, line in (("white", 4.5), ("black", 2.0)):
        ax.add_patch(Rectangle((column, row), 1, 1, fill=False, edgecolor=colour, linewidth=line, clip_on=False))
    _title(ax, f"What the patch at ({row}, {column}) depends on")
    ramp = LinearSegmentedColormap.from_list("weight", ["white", WEIGHT_COLOUR])
    _colour_bar(figure, ScalarMappable(norm, ramp), ax, "weight")
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
    axes, figure = _panels(len(orders), columns=4, width=3.0, height=2.5)
    for ax, (name, order) in zip(axes, orders.items(), strict=True):
        ranks = order.ranks.cpu()
        columns = ranks.float().mean(0).argsort(stable=True)
        drawn = ax.imshow(ranks[:, columns].numpy(), cmap=RANK_COLOURS, norm=norm, aspect="auto", interpolation="none")
        _title(ax, str(name))
        ax.tick_params(labelsize=TICK)
        ax.set_xticks([0, n - 1] if n > 1 else [0])
        ax.set_yticks([0, len(order) - 1] if len(order) > 1 else [0])
        if ax.get_subplotspec().is_first_col():
            ax.set_ylabel("image", fontsize=LABEL)
    figure.supxlabel("patches, sorted by the mean rank of the class", fontsize=LABEL)
    _colour_bar(figure, drawn, list(axes), "rank (0 = first)").ax.invert_yaxis()
    return figure


def plot_training(log: str | Path | Sequence[Mapping[str, float]], keys: Sequence[str] = ()) -> Figure:
    """Curves of a training run over its steps, one panel a key.

    Args:
        log: The log.jsonl of a run (an unfinished last line is left out), or its lines as dicts; each has "step".
        keys: What to draw; empty draws all that was logged. A step that lacks a key leaves its curve out there.

    Raises:
        CollapseError: For a log that is empty or no such file, or a key that was never logged.
        OSError: Where the file cannot be read.
    """
    lines = _read_log(Path(log)) if isinstance(log, (str, Path)) else list(log)
    if not lines or not all("step" in line for line in lines):
        raise CollapseError('log must hold at least one line, each with "step"')
    logged = list(dict.fromkeys(key for line in lines for key in line if key != "step"))
    keys = [keys] if isinstance(keys, str) else list(keys) or logged
    if unknown := [key for key in keys if key not in logged]:
        raise CollapseError(f"keys: {', '.join(unknown)} not in the log; it has {', '.join(logged)}")
    if not keys:
        raise CollapseError("log holds nothing but steps")
    axes, figure = _panels(len(keys), columns=3, width=3.6, height=2.5)
    for ax, key in zip(axes, keys, strict=True):
        points = [(line["step"], line[key]) for line in lines if key in line]
        marker = "o" if len(points) == 1 else ""  # a line of one point would be invisible
        ax.plot(*zip(*points, strict=True), color=LINE_COLOURS[0], linewidth=1.6, marker=marker)
        _title(ax, key)
        _plain_axes(ax)
    figure.supxlabel("step", fontsize=LABEL)
    return figure


def plot_uncertainty(curves: Mapping[str, Sequence[float] | Tensor], visible: Sequence[int] | None = None) -> Figure:
    """How much is still unknown after the first patches of each order: the lower, the better the order.

    Args:
        curves: By the order's name, the mean error of the hidden patches at each number of visible ones. "random" is
            drawn in grey dashes, and the areas of the others are given against it.
        visible: Those numbers, ascending, at least two; 0, 1, 2, ... by default.

    Returns:
        A figure whose legend lists the smallest area under the curve (the best order) first.

    Raises:
        CollapseError: For no curve, or curves of another length than `visible`.
    """
    values = {name: torch.as_tensor(curve).detach().cpu().double().numpy() for name, curve in curves.items()}
    lengths = {curve.shape for curve in values.values()}
    x = np.arange(*next(iter(lengths), (0,))[:1]) if visible is None else np.asarray(visible)
    if len(x) < 2 or lengths != {x.shape}:
        raise CollapseError(f"curves must be of one length, at least 2 and that of visible, got {sorted(lengths)}")
    areas = {name: (np.diff(x) * (c[1:] + c[:-1]) / 2).sum() / (x[-1] - x[0]) for name, c in values.items()}
    figure = Figure(figsize=(9.2, 4.4), layout="constrained")
    ax = figure.subplots()
    drawn = {}
    for name, curve in values.items():
        i = len(drawn) - ("random" in drawn)
        style = LINE_STYLES[i // len(LINE_COLOURS) % len(LINE_STYLES)]
        look = {"color": LINE_COLOURS[i % len(LINE_COLOURS)], "linestyle": style}
        if name == "random":
            look = {"color": "0.5", "linestyle": "--"}
        (drawn[name],) = ax.plot(x, curve, linewidth=1.8, **look)
    best_first = sorted(areas, key=areas.get)
    labels = [f"{name}  {areas[name]:.3f}{_against(areas, name)}" for name in best_first]
    title = "mean error (against random)" if "random" in areas else "mean error"
    lines = [drawn[name] for name in best_first]
    legend = ax.legend(
        lines, labels, title=title, fontsize=TICK, title_fontsize=TICK, frameon=False, alignment="left",
        loc="upper left", bbox_to_anchor=(1.0, 1.0),
    )  # fmt: skip
    for text in legend.get_texts():
        text.set_parse_math(False)
    ax.set_xlabel("visible patches", fontsize=LABEL)
    ax.set_ylabel("error of the hidden patches", fontsize=LABEL)
    ax.set_xlim(x[0], x[-1])
    _plain_axes(ax)
    return figure


def blanked(picture: np.ndarray, mask: Tensor, grid: Sequence[int]) -> np.ndarray:
    """A copy of a picture (H, W, 3) with every patch in light grey where mask (N,) is False.

    Where the grid does not divide the picture, a pixel belongs to the patch that its centre lies in.
    """
    shape = picture.shape[:2]
    rows, columns = ((2 * np.arange(s) + 1) * g // (2 * s) for s, g in zip(shape, grid, strict=True))
    shown = mask.cpu().numpy().reshape(grid)[rows[:, None], columns]
    return np.where(shown[..., None], picture, BLANK)


def _picture(image: Tensor) -> np.ndarray:
    """(3, H, W) in [0, 1] -> (H, W, 3) for imshow."""
    if not isinstance(image, Tensor) or image.ndim != 3 or image.shape[0] != 3 or not image.is_floating_point():
        raise CollapseError(f"image must be a float tensor of shape (3, H, W), got {_shape(image)}")
    image = image.detach().float().cpu()
    low, high = image.aminmax()
    if not (low >= -1e-3 and high <= 1 + 1e-3):  # rounding of undone normalisation is forgiven, NaN is not
        raise CollapseError(f"image must be in [0, 1], got [{low:.3g}, {high:.3g}]; undo its normalisation first")
    return image.clamp(0, 1).permute(1, 2, 0).numpy()


def _shape(value: object) -> tuple[int, ...]:
    return tuple(getattr(value, "shape", ()))


def _show(ax: Axes, values: np.ndarray, grid: Sequence[int], picture: np.ndarray | None = None, **style):
    """Draws over the whole image in coordinates of patches: patch (row, column) spans x [column, column + 1]."""
    height, width = grid
    shape = (values if picture is None else picture).shape[:2]
    ax.set_axis_off()
    return ax.imshow(
        values,
        extent=(0, width, height, 0),
        aspect=(shape[0] / height) / (shape[1] / width),  # so that pixels are square whatever patches are
        interpolation="none" if picture is not None else "antialiased",
        **style,
    )


def _title(ax: Axes, text: str) -> None:
    ax.set_title(text, fontsize=TITLE, parse_math=False)  # names may hold dollar signs


def _colour_bar(figure: Figure, drawn, ax, label: str):
    bar = figure.colorbar(drawn, ax=ax, shrink=0.9, pad=0.02)
    bar.set_label(label, fontsize=LABEL)
    bar.ax.tick_params(labelsize=TICK)
    bar.outline.set_visible(False)
    return bar


def _plain_axes(ax: Axes) -> None:
    ax.tick_params(labelsize=TICK)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(color="0.9", linewidth=0.6)
    ax.set_axisbelow(True)


def _panels(count: int, columns: int, width: float, height: float) -> tuple[list[Axes], Figure]:
    """So many panels, row by row; sizes of a panel in inches."""
    rows = -(-count // columns)
    columns = -(-count // rows)
    figure = Figure(figsize=(columns * width + 0.8, rows * height + 0.3), layout="constrained")
    return [figure.add_subplot(rows, columns, i + 1) for i in range(count)], figure


def _against(areas: Mapping[str, float], name: str) -> str:
    """The area against that of the random order, in per cent, where there is one."""
    if name == "random" or not areas.get("random"):
        return ""
    return f"  ({100 * (areas[name] / areas['random'] - 1):+.1f}%)"


def _read_log(path: Path) -> list[dict[str, float]]:
    lines = [line for line in path.read_text().splitlines() if line.strip()]
    if lines and not lines[-1].endswith("}"):
        lines.pop()  # a run that is still writing
    try:
        return [json.loads(line) for line in lines]
    except json.JSONDecodeError as error:
        raise CollapseError(f"log: {path} is no log.jsonl: {error}") from error
