"""Curves over training steps, and over the number of visible patches."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from ..order import CollapseError
from .style import LABEL, LINE_COLOURS, legend_beside, line_style, panels, plain_axes, set_title


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
    axes, figure = panels(len(keys), columns=3, width=3.6, height=2.5)
    for ax, key in zip(axes, keys, strict=True):
        points = [(line["step"], line[key]) for line in lines if key in line]
        marker = "o" if len(points) == 1 else ""  # a line of one point would be invisible
        ax.plot(*zip(*points, strict=True), color=LINE_COLOURS[0], linewidth=1.6, marker=marker)
        set_title(ax, key)
        plain_axes(ax)
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
        look = line_style(len(drawn) - ("random" in drawn))
        if name == "random":
            look = {"color": "0.5", "linestyle": "--"}
        (drawn[name],) = ax.plot(x, curve, linewidth=1.8, **look)
    best_first = sorted(areas, key=areas.get)
    labels = [f"{name}  {areas[name]:.3f}{_against(areas, name)}" for name in best_first]
    title = "mean error (against random)" if "random" in areas else "mean error"
    lines = [drawn[name] for name in best_first]
    legend_beside(ax, lines, labels, title=title)
    ax.set_xlabel("visible patches", fontsize=LABEL)
    ax.set_ylabel("error of the hidden patches", fontsize=LABEL)
    ax.set_xlim(x[0], x[-1])
    plain_axes(ax)
    return figure


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
