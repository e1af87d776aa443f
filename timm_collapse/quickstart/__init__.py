"""The first minutes, offline: what the orders of two photos are worth and save, then the way there in miniature."""

from __future__ import annotations

from pathlib import Path
from time import perf_counter

from PIL import Image
from rich.console import Console

from ..collapse import default_orderer
from .miniature import train_in_miniature
from .photos import ORDERER, show_photos

NEXT = f"""[bold]Next[/], your own photo and your own model:
    timm-collapse order photo.jpg --output order.png
    timm-collapse evaluate --model vit_small_patch16_224 --dataset path/to/images --orderer random {ORDERER}
    collapse(timm.create_model("vit_small_patch16_224", pretrained=True), "{default_orderer(None)}", keep=0.22)"""


def quickstart(output: str | Path = "runs/quickstart", seed: int = 0, steps: int = 150) -> dict[str, float]:
    """Orders of the two photos that scikit-learn ships, told by a bundled judge; then CoMAE and a ranker in miniature.

    Args:
        output: Folder for everything that is made.
        seed: Of the crops, the random order and all trainings.
        steps: Training length of each of the two models.

    Returns:
        Area under the uncertainty curve of each order, relative to random order (-.1 = 10% less): first those of
        bundled orderers on photos, then, each name begun by "miniature: ", those of what was trained here.
    """
    output, console, start = Path(output), Console(), perf_counter()
    output.mkdir(parents=True, exist_ok=True)
    photos = load_photos()
    console.print("[bold]1/2[/] Bundled weights on two photos that they were not trained on: which patches explain the "
                  "others?")  # fmt: skip
    areas = show_photos(console, photos, output, seed)
    console.print(f"    pictures: order_china.png, order_flower.png, uncertainty.png ({perf_counter() - start:.0f} s)")
    console.print("[bold]2/2[/] Training in miniature, on crops of one photo, told on the other")
    trained = train_in_miniature(console, *photos.values(), output, seed, steps)
    console.print("    pictures: comae.png, dependency_*.png, uncertainty_miniature.png "
                  f"({perf_counter() - start:.0f} s in all); all is in {output}")  # fmt: skip
    console.print(NEXT, highlight=False, soft_wrap=True)
    return areas | {f"miniature: {name}": area for name, area in trained.items()}


def load_photos() -> dict[str, Image.Image]:
    """The two photos in scikit-learn's wheel, 640 x 427 pixels."""
    from sklearn.datasets import load_sample_image

    return {name: Image.fromarray(load_sample_image(f"{name}.jpg")) for name in ("china", "flower")}
