"""Pictures of what a generator works with and makes: the orders of classes, image grids, and films."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from torch import Tensor

from ..order import ClassOrderBank, CollapseError, Order, check_grid
from .style import (
    BLANK,
    LABEL,
    MAX_IMAGES,
    RANK_COLOURS,
    TICK,
    blanked,
    colour_bar,
    panels,
    set_title,
    shape_of,
    show_on_grid,
    to_picture,
)

if TYPE_CHECKING:
    from ..models import PixelCodec, VaeCodec

MAX_CLASSES = 20
MAX_FILM = 4  # samples
MIN_PIXELS = 96  # smaller images are enlarged to this


def plot_bank(bank: ClassOrderBank, names: Sequence[str] | None = None) -> Figure:
    """Where the orders of each class begin: the mean rank of every patch, one map a class.

    A map of strong colours belongs to a class whose images agree on their order; one that is pale, to a class whose
    images do not. All maps share their colours.

    Args:
        bank: At most its first 20 classes that have orders are drawn.
        names: The names of all its classes, in the order of their labels; "class 0", "class 1", ... by default.

    Raises:
        CollapseError: For another number of names.
    """
    if names is not None and len(names) != bank.num_classes:
        raise CollapseError(f"names must be one for each of the {bank.num_classes} classes, got {len(names)}")
    filled = bank.seen.nonzero().flatten().tolist()
    shown, n = filled[:MAX_CLASSES], bank.num_patches
    ranks = n * (1 - bank.means[shown].double().numpy())
    low, high = ranks.min(), ranks.max()
    norm = Normalize(low, high if high > low else low + 1)
    axes, figure = panels(len(shown), columns=5, width=2.1, height=2.3)
    for ax, label, values in zip(axes, shown, ranks, strict=True):
        # without a picture, a patch is drawn as a square
        drawn = show_on_grid(
            ax, values.reshape(bank.grid), bank.grid, np.empty(bank.grid), cmap=RANK_COLOURS, norm=norm
        )
        set_title(ax, names[label] if names is not None else f"class {label}")
    if len(shown) < bank.num_classes:
        figure.supxlabel(f"{len(shown)} of {bank.num_classes} classes", fontsize=LABEL)
    colour_bar(figure, drawn, list(axes), "mean rank (0 = first)").ax.invert_yaxis()
    return figure


class Film:
    """Records a generation: the callback of `MAR.generate` that keeps what `plot_film` draws.

    Args:
        grid: Token grid (h, w) of the generator.
        steps: Iterations of the generation.
        given: (L,) bool, True for tokens that are kept, not generated; none by default.
        samples: So many first samples of the batch are recorded.
        states: So many states are recorded, evenly from the first to the last.
    """

    def __init__(self, grid: Sequence[int], steps: int, given: Tensor | None = None, samples: int = 4, states: int = 8):
        self.grid, self.given, self.samples = check_grid(grid), given, samples
        self.chosen = {round(float(step)) for step in np.linspace(0, steps - 1, min(states, steps))}
        self.latents: list[Tensor] = []
        self.known: list[Tensor] = []
        self.iterations: Tensor | None = None

    def __call__(self, step: int, latents: Tensor, known: Tensor) -> None:
        """Records a step; the arguments are those of the callback."""
        known = known[: self.samples].cpu()
        if self.iterations is None:
            self.iterations = torch.full(known.shape, step)
        self.iterations[~known] = step + 1
        if step in self.chosen:
            self.latents.append(latents[: self.samples].clone())
            self.known.append(known)

    def plot(self, codec: PixelCodec | VaeCodec) -> Figure:
        """The film strip, decoded.

        Raises:
            CollapseError: Where nothing is recorded yet.
        """
        if self.iterations is None:
            raise CollapseError("film: holds no states yet; give it to MAR.generate as callback")
        scores = -self.iterations.float()
        if self.given is not None:
            scores[:, self.given.cpu()] = float("inf")
        states = torch.stack([codec.decode(latents).float().cpu() for latents in self.latents])
        return plot_film(states, torch.stack(self.known), Order(scores, self.grid))


def plot_film(states: Tensor, known: Tensor, order: Order) -> Figure:
    """How images came to be: one row a sample, from its first tokens to the image, and its order beside it.

    Args:
        states: (S, B, 3, H, W) float in [0, 1]: the images at S moments, at most 4 samples.
        known: (S, B, L) bool: which tokens are generated at that moment; the others are drawn grey.
        order: B orders. Tokens of equal scores were generated together and share a colour; those of infinite scores
            were there before and are drawn grey.

    Raises:
        CollapseError: For states of another shape or range, or masks or orders that do not fit them.
    """
    if not isinstance(states, Tensor) or states.ndim != 5 or 0 in states.shape or states.shape[1] > MAX_FILM:
        raise CollapseError(
            f"states must be (S, B, 3, H, W), S at least 1, B in [1, {MAX_FILM}], got {shape_of(states)}"
        )
    moments, batch, tokens = *states.shape[:2], order.num_patches
    if shape_of(known) != (moments, batch, tokens) or len(order) != batch or known.dtype != torch.bool:
        raise CollapseError(
            f"known must be bool {(moments, batch, tokens)} and order of {batch} samples, got {shape_of(known)} and "
            f"{len(order)}"
        )
    figure = Figure(figsize=(1.3 * (moments + 1) + 1, 1.4 * batch + 0.4), layout="constrained")
    axes = figure.subplots(batch, moments + 1, squeeze=False)
    places = [_places(scores) for scores in order.scores.detach().float().cpu()]
    norm = Normalize(0, max(1, max(float(np.nanmax(each, initial=0)) for each in places)))
    for sample in range(batch):
        for moment in range(moments):
            picture, mask = to_picture(states[moment, sample]), known[moment, sample]
            show_on_grid(axes[sample, moment], blanked(picture, mask, order.grid), order.grid)
            if not sample:
                axes[0, moment].set_title(f"{int(mask.sum())} of {tokens}", fontsize=LABEL)
        heat = np.ma.masked_invalid(places[sample].reshape(order.grid))
        colours = RANK_COLOURS.with_extremes(bad=(BLANK,) * 3)
        drawn = show_on_grid(axes[sample, -1], heat, order.grid, picture, cmap=colours, norm=norm)
    axes[0, -1].set_title("order", fontsize=LABEL)
    colour_bar(figure, drawn, list(axes[:, -1]), "0 = first").ax.invert_yaxis()
    return figure


def plot_samples(images: Tensor, labels: Sequence[int | str] | None = None, columns: int = 8) -> Figure:
    """Images in a grid, small ones enlarged without blur.

    Args:
        images: (B, 3, H, W) float in [0, 1], at most 256.
        labels: One an image: those of one label stand in rows of their own, in the sequence in which the labels first
            appear, with the label in the margin. None: all in common rows.
        columns: Images in a row, at least 1; more of one label continue in further rows.

    Raises:
        CollapseError: For images of another shape or range, too many of them, another number of labels, or no columns.
    """
    if not isinstance(images, Tensor) or images.ndim != 4 or not 1 <= len(images) <= MAX_IMAGES:
        raise CollapseError(f"images must be (B, 3, H, W), B in [1, {MAX_IMAGES}], got {shape_of(images)}")
    if labels is not None and len(labels) != len(images):
        raise CollapseError(f"labels must be {len(images)}, one an image, got {len(labels)}")
    if columns < 1:
        raise CollapseError(f"columns must be at least 1, got {columns}")
    groups: dict[object, list[int]] = {}
    for number, label in enumerate([""] * len(images) if labels is None else labels):
        groups.setdefault(label, []).append(number)
    rows, names = [], []
    for label, members in groups.items():
        for start in range(0, len(members), columns):
            rows.append(members[start : start + columns])
            names.append("" if start else str(label))
    width = max(len(row) for row in rows)
    factor = -(-MIN_PIXELS // max(images.shape[2:]))  # whole, so that every pixel has the same size
    cell = [side * factor + max(2, side * factor // 24) for side in images.shape[2:]]  # a white gap after each
    canvas = np.ones((len(rows) * cell[0], width * cell[1], 3))
    for r, row in enumerate(rows):
        for c, number in enumerate(row):
            picture = to_picture(images[number]).repeat(factor, 0).repeat(factor, 1)
            y, x = r * cell[0], c * cell[1]
            canvas[y : y + picture.shape[0], x : x + picture.shape[1]] = picture
    margin = 0.1 * max(map(len, names)) + 0.2
    inches = [side / 150 for side in canvas.shape[:2]]  # a pixel of the canvas is one of the file that `save` writes
    figure = Figure(figsize=(inches[1] + margin, inches[0] + 0.2), layout="constrained")
    ax = figure.subplots()
    ax.imshow(canvas, interpolation="nearest")
    ax.spines[:].set_visible(False)
    ax.set_xticks([])
    ax.set_yticks((np.arange(len(rows)) + 0.5) * cell[0], names, parse_math=False)
    ax.tick_params(length=0, labelsize=TICK)
    return figure


def _places(scores: Tensor) -> np.ndarray:
    """(L,) scores -> the place of each, 0 = first, equal ones sharing theirs; NaN for infinite ones."""
    finite = scores.isfinite()
    places = torch.full(scores.shape, float("nan"))
    places[finite] = (-scores[finite]).unique(return_inverse=True)[1].float()
    return places.numpy()
