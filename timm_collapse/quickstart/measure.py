"""What both parts measure with: crops of photos, and what a judge does not know after each prefix of an order."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm.auto import tqdm

from ..data import train_transform
from ..evaluation import uncertainty_curve
from ..evaluation.uncertainty import visible_counts
from ..models import Reconstructor
from ..models.normalisation import Normalisation
from ..order import Order
from ..plots import plot_uncertainty, save

POINTS = 7  # measured numbers of visible patches
SHARES = (6, 14, 32)  # of 64 patches: the columns of the table


def random_crops(
    photos: Iterable[Image.Image],
    count: int,
    size: int,
    normalisation: Normalisation,
    seed: int,
    scale: tuple[float, float],
) -> Tensor:
    """Random crops of each photo, normalised.

    Args:
        photos: n of them.
        count: Crops of each.
        size: Side in pixels that the crops are resized to.
        normalisation: Of the result.
        seed: Of the crops.
        scale: Smallest and largest share of the photo's area.

    Returns:
        (n count, 3, size, size).
    """
    transform = train_transform(size, normalisation.mean, normalisation.std, scale)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return torch.stack([transform(photo) for photo in photos for _ in range(count)])


def compare(
    console: Console, judge: Reconstructor, images: Tensor, orders: dict[str, Order], picture: Path
) -> dict[str, float]:
    """Measures, prints and draws what is left unknown after the first patches of each order.

    Args:
        console: Where the table goes.
        judge: Reconstructor that no orderer learned from.
        images: (B, 3, H, W) in its normalisation.
        orders: By name, B orders each; one is "random".
        picture: The drawing's file.

    Returns:
        Area under the curve of each order, relative to that of the random one.
    """
    n = orders["random"].num_patches
    visible = visible_counts(n, POINTS)
    curves = {
        name: uncertainty_curve(judge, images, order, visible)
        for name, order in tqdm(orders.items(), desc="    judging", leave=False)
    }
    random, shown = curves["random"], [round(n * share / 64) for share in SHARES]
    table = Table("order", "area", "to random", *(f"{k} of {n} seen" for k in shown), title="error of what is hidden",
                  title_justify="left")  # fmt: skip
    for name, curve in sorted(curves.items(), key=lambda item: item[1].area):
        relative = [f"{curve.area / random.area - 1:+.1%}", *(f"{curve.at(k) / random.at(k) - 1:+.1%}" for k in shown)]
        if name == "random":
            relative = ["", *(f"{random.at(k):.3f}" for k in shown)]
        table.add_row(name, f"{curve.area:.3f}", *relative)
    console.print(table)
    save(plot_uncertainty({name: curve.error for name, curve in curves.items()}, visible), picture)
    return {name: curve.area / random.area - 1 for name, curve in curves.items()}
