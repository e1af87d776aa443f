"""How pictures look: colours, sizes, and what the figures share.

Every plot function of this room returns a `matplotlib.figure.Figure` and touches no global state of matplotlib: a
notebook shows the figure, `save` writes it, and nothing needs a display.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from ..order import CollapseError

# early is bright yellow, late is dark: readable with any colour vision, and in grey
RANK_COLOURS = colormaps["viridis_r"]
LINE_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito
LINE_STYLES = ("-", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))  # each serves one round of the colours; dashes are for random
BLANK = 0.93  # grey level of patches that are not kept
MAX_IMAGES = 256
TITLE, LABEL, TICK = 12, 10, 9  # font sizes in points
SUFFIXES = (".png", ".pdf", ".svg")


def save(figure: Figure, path: str | Path) -> Path:
    """Writes a figure; the suffix decides the format.

    Args:
        figure: Any figure.
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


def to_picture(image: Tensor) -> np.ndarray:
    """(3, H, W) in [0, 1] -> (H, W, 3) for imshow."""
    if not isinstance(image, Tensor) or image.ndim != 3 or image.shape[0] != 3 or not image.is_floating_point():
        raise CollapseError(f"image must be a float tensor of shape (3, H, W), got {shape_of(image)}")
    image = image.detach().float().cpu()
    low, high = image.aminmax()
    if not (low >= -1e-3 and high <= 1 + 1e-3):  # rounding of undone normalisation is forgiven, NaN is not
        raise CollapseError(f"image must be in [0, 1], got [{low:.3g}, {high:.3g}]; undo its normalisation first")
    return image.clamp(0, 1).permute(1, 2, 0).numpy()


def shape_of(value: object) -> tuple[int, ...]:
    """The shape of a tensor or an array, for an error message; () for anything else."""
    return tuple(getattr(value, "shape", ()))


def blanked(picture: np.ndarray, mask: Tensor, grid: Sequence[int]) -> np.ndarray:
    """A copy of a picture (H, W, 3) with every patch in light grey where mask (N,) is False.

    Where the grid does not divide the picture, a pixel belongs to the patch that its centre lies in.
    """
    shape = picture.shape[:2]
    rows, columns = ((2 * np.arange(s) + 1) * g // (2 * s) for s, g in zip(shape, grid, strict=True))
    shown = mask.cpu().numpy().reshape(grid)[rows[:, None], columns]
    return np.where(shown[..., None], picture, BLANK)


def show_on_grid(ax: Axes, values: np.ndarray, grid: Sequence[int], picture: np.ndarray | None = None, **style):
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


def set_title(ax: Axes, text: str) -> None:
    """Sets the title of a panel."""
    ax.set_title(text, fontsize=TITLE, parse_math=False)  # names may hold dollar signs


def colour_bar(figure: Figure, drawn, ax: Axes | list[Axes], label: str):
    """Adds the bar of colours beside one or several axes, and returns it."""
    bar = figure.colorbar(drawn, ax=ax, shrink=0.9, pad=0.02)
    bar.set_label(label, fontsize=LABEL)
    bar.ax.tick_params(labelsize=TICK)
    bar.outline.set_visible(False)
    return bar


def plain_axes(ax: Axes) -> None:
    """Small ticks, a pale grid, no box."""
    ax.tick_params(labelsize=TICK)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(color="0.9", linewidth=0.6)
    ax.set_axisbelow(True)


def line_style(i: int) -> dict:
    """Colour and stroke of the line with number i."""
    return {"color": LINE_COLOURS[i % len(LINE_COLOURS)],
            "linestyle": LINE_STYLES[i // len(LINE_COLOURS) % len(LINE_STYLES)]}  # fmt: skip


def legend_beside(ax: Axes, *lines_and_labels, title: str | None = None) -> None:
    """A legend right of the axes; of all labelled lines where none are given."""
    legend = ax.legend(
        *lines_and_labels, title=title, fontsize=TICK, title_fontsize=TICK, frameon=False, alignment="left",
        loc="upper left", bbox_to_anchor=(1.0, 1.0),
    )  # fmt: skip
    for text in legend.get_texts():
        text.set_parse_math(False)  # names may hold dollar signs


def panels(count: int, columns: int, width: float, height: float) -> tuple[list[Axes], Figure]:
    """So many panels, row by row; sizes of a panel in inches."""
    rows = -(-count // columns)
    columns = -(-count // rows)
    figure = Figure(figsize=(columns * width + 0.8, rows * height + 0.3), layout="constrained")
    return [figure.add_subplot(rows, columns, i + 1) for i in range(count)], figure
