"""What the package is for, with bundled weights: the order of two photos, what it is worth, and what it saves."""

from __future__ import annotations

from pathlib import Path

import timm
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor

from ..collapse import collapse
from ..data.images import photo_tensor
from ..evaluation import images_per_second
from ..models import CollapseOrder
from ..models.normalisation import Normalisation
from ..plots import plot_order, save
from .measure import compare, random_crops

SIZE, GRID, KEEP = 224, (14, 14), 0.22
ORDERER, BEST = "collapse_ranker_tiny_224", "collapse_ranker_tiny_224_rerun"
CROPS, SCALE = 8, (0.25, 1.0)  # of each photo: no crop is enlarged
VIT, BATCH = "vit_small_patch16_224", 8


def show_photos(console: Console, photos: dict[str, Image.Image], output: Path, seed: int) -> dict[str, float]:
    """Orders, uncertainty and speed, printed and drawn.

    Args:
        console: Where the tables go.
        photos: By name; nothing here was trained on them.
        output: Folder of the pictures.
        seed: Of the crops and the random order.

    Returns:
        Area under the uncertainty curve of each order, relative to random order.
    """
    judge = timm.create_model("collapse_reconstructor_tiny_224", pretrained=True).eval()
    normalisation = Normalisation.of(judge.pretrained_cfg)
    orderer, best = CollapseOrder.from_pretrained(ORDERER), CollapseOrder.from_pretrained(BEST)
    for name, photo in photos.items():
        pixels = photo_tensor(photo, SIZE)
        order = orderer(normalisation.to(Normalisation.of(orderer), normalisation.apply(pixels.unsqueeze(0))))
        save(plot_order(pixels, order, KEEP), output / f"order_{name}.png")
    images = random_crops(photos.values(), CROPS, SIZE, normalisation, seed, SCALE)
    seen = normalisation.to(Normalisation.of(orderer), images)
    order = orderer(seen)
    orders = {
        "random": CollapseOrder.baseline("random", seed=seed)(images, GRID),
        "bayer (spread)": CollapseOrder.baseline("bayer")(images, GRID),
        "collapse (tiny)": order,
        "collapse (rerun, the costliest)": best(normalisation.to(Normalisation.of(best), images)),
        "reversed (tiny)": order.reversed(),
    }
    areas = compare(console, judge, images, orders, output / "uncertainty.png")
    _speed(console, seen[:BATCH])
    return areas


def _speed(console: Console, images: Tensor) -> None:
    plain, collapsed = (timm.create_model(VIT).eval() for _ in range(2))
    collapse(collapsed, ORDERER, keep=KEEP)
    calls = {"plain": lambda: plain(images), "collapsed": lambda: collapsed(images)}
    with torch.inference_mode():
        speed = images_per_second(calls, len(images), runs=3)
    console.print(
        f"    {VIT} on this machine: {speed['plain']:.1f} images a second; seeing {KEEP:.0%} of the patches, the order "
        f"counted: {speed['collapsed']:.1f}, [bold]{speed['collapsed'] / speed['plain']:.1f} times as many[/]"
    )
