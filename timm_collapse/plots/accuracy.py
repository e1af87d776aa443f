"""The pictures of evaluations: accuracy over keep or tokens, and over measured speed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, PercentFormatter, ScalarFormatter

from ..order import CollapseError
from .style import LABEL, legend_beside, line_style, plain_axes

if TYPE_CHECKING:
    from ..evaluation import AccuracyCurve


def plot_accuracy(
    curves: Mapping[str, AccuracyCurve], speeds: Mapping[str, Sequence[float]] | None = None, points: str = "top1"
) -> Figure:
    """Accuracy over the share of visible patches and, where speeds are given, over images a second.

    Args:
        curves: By the name that the legend shows. A curve of one point (a plain model) is a dotted line in the first
            panel and a marker in the second. Bands are one standard error to each side; a ring marks the knee.
        speeds: By the same names, images a second at each keep of the curve; None draws the first panel alone.
        points: "top1" or "top5".

    Raises:
        CollapseError: For no curve, other points, or speeds that do not fit the curves.
    """
    if not curves:
        raise CollapseError("curves must hold at least one curve, got none")
    if points not in ("top1", "top5"):
        raise CollapseError(f"points must be top1 or top5, got {points!r}")
    if speeds is not None and {k: len(v) for k, v in speeds.items()} != {k: len(c.keeps) for k, c in curves.items()}:
        raise CollapseError("speeds must have the names of the curves and one value for each of their keeps")
    panels = 1 if speeds is None else 2
    figure = Figure(figsize=(4.6 * panels + 2.8, 4.2), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False, sharey=True)[0]
    lines = []
    for i, (name, curve) in enumerate(curves.items()):
        style = line_style(i)
        values, errors = getattr(curve, points), getattr(curve, f"{points}_error")
        if len(curve.keeps) == 1:
            lines.append(axes[0].axhline(values[0], color=style["color"], linestyle=":", linewidth=1.6))
        else:
            lines.append(_line(axes[0], curve.keeps, values, style))
            low, high = ([v + sign * e for v, e in zip(values, errors, strict=True)] for sign in (-1, 1))
            axes[0].fill_between(curve.keeps, low, high, color=style["color"], alpha=0.15, linewidth=0)
        _mark_knee(axes[0], curve, curve.keeps, values, style["color"])
        if speeds is not None:
            marker = {"marker": "s"} if len(curve.keeps) == 1 else {}
            _line(axes[1], speeds[name], values, {**style, **marker})
            _mark_knee(axes[1], curve, speeds[name], values, style["color"])
    _finish_keep_axis(axes[0], min(curve.keeps[-1] for curve in curves.values()))
    axes[0].set_ylabel(f"top-{points[-1]} accuracy (%)", fontsize=LABEL)
    if speeds is not None:
        axes[1].set_xlabel("images per second, order included", fontsize=LABEL)
        axes[1].set_xlim(left=0)
        plain_axes(axes[1])
    labels = [name if curve.knee is None else f"{name}  (knee at {curve.knee:.0%})" for name, curve in curves.items()]
    legend_beside(axes[-1], lines, labels)
    return figure


def plot_budgets(points: Mapping[str, Sequence[tuple[float, float, float, float]]]) -> Figure:
    """Accuracy over tokens, and over images a second, of models with patches of different sizes.

    Args:
        points: By the name that the legend shows: (tokens, top-1 in per cent, its standard error, images a second).

    Raises:
        CollapseError: For no points.
    """
    if not points or not all(points.values()):
        raise CollapseError("points must hold at least one point for each name, got none")
    figure = Figure(figsize=(12, 4.4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for i, (name, values) in enumerate(points.items()):
        tokens, accuracy, errors, speeds = zip(*values, strict=True)
        for ax, x in zip(axes, (tokens, speeds)):
            ax.errorbar(x, accuracy, errors, linewidth=1.6, marker=".", markersize=8, label=name, **line_style(i))
    for ax, label in zip(axes, ("tokens", "images per second, order included")):
        ax.set_xscale("log", base=2 if label == "tokens" else 10)
        ax.set_xlabel(label, fontsize=LABEL)
        plain_axes(ax)
    for ax in axes:  # numbers, not powers
        ax.xaxis.set_major_formatter(ScalarFormatter())
    axes[1].xaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5)))
    axes[1].xaxis.set_minor_formatter(NullFormatter())
    axes[0].set_ylabel("top-1 accuracy (%)", fontsize=LABEL)
    legend_beside(axes[1])
    return figure


def _line(ax: Axes, x: Sequence[float], y: Sequence[float], style: dict):
    return ax.plot(x, y, linewidth=1.6, markersize=6, **{"marker": ".", **style})[0]


def _mark_knee(ax: Axes, curve: AccuracyCurve, x: Sequence[float], y: Sequence[float], colour: str) -> None:
    if curve.knee is not None:
        at = curve.at(curve.knee)
        ax.plot([x[at]], [y[at]], "o", markersize=10, markerfacecolor="none", markeredgecolor=colour, label="knee")


def _finish_keep_axis(ax: Axes, smallest: float) -> None:
    """All patches on the left, as more are masked to the right; linear, as the area under the curve is."""
    ax.set_xlabel("share of visible patches", fontsize=LABEL)
    ax.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    ax.set_xlim(1.02, min(smallest, 0.98) - 0.02)
    plain_axes(ax)
