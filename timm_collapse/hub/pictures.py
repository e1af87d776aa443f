"""The picture of a model card: what the weights do, made with them."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..collapse.base import Collapsed
from ..data.images import photo_tensor
from ..models import MAR, CollapseOrder, CoMAE, Ranker
from ..models.normalisation import Normalisation
from ..order import CollapseError
from ..plots import plot_kept, plot_order, plot_samples, save

CREDIT = "Photos: scikit-learn's flower.jpg (vultilion) and china.jpg (T. Liu), CC BY 2.0"
MAX_TOKENS = 256
"""No picture is generated with more: it would take minutes."""
DIFFUSION_STEPS = 25


class Picture(NamedTuple):
    """A picture beside the card.

    Attributes:
        file: Its name.
        caption: What it shows.
    """

    file: str
    caption: str


@torch.no_grad()
def draw_picture(model: nn.Module, folder: Path) -> Picture | None:
    """Samples of a generator, kept patches of a collapsed model, or the order of an orderer.

    Returns:
        None where there is nothing to show, or a generator's VAE cannot be had.
    """
    if isinstance(model, MAR):
        return _samples(model, folder)
    if isinstance(model, Collapsed):
        height, width = model.pretrained_cfg["input_size"][1:]
        photos = _photos(height, width)
        order = model.compute_order(model.normalisation.apply(photos))
        save(plot_kept(photos, order, model.keep), folder / "kept.png")
        return Picture("kept.png", f"The patches that it sees. {CREDIT}.")
    if isinstance(model, (CoMAE, Ranker)):
        orderer = CollapseOrder(model)
        photos = _photos(*model.pretrained_cfg["input_size"][1:])[:1]
        order = orderer(Normalisation.of(orderer).apply(photos))
        save(plot_order(photos[0], order), folder / "order.png")
        return Picture("order.png", f"The order of a photo. {CREDIT}.")
    return None


def _samples(model: MAR, folder: Path) -> Picture | None:
    if model.seq_len > MAX_TOKENS:
        return None
    try:
        codec = model.codec()
    except (CollapseError, ImportError):  # a VAE that is not here
        return None
    classes = range(min(model.num_classes, 10)) if model.num_classes else [0]
    labels = [label for label in classes for _ in range(4)]
    generator = torch.Generator().manual_seed(0)
    latents = model.generate(
        labels, min(16, model.seq_len), guidance_scale=2.0 if model.num_classes else 1.0, guidance_schedule="constant",
        generator=generator, diffusion_steps=DIFFUSION_STEPS,
    )  # fmt: skip
    save(plot_samples(codec.decode(latents), labels if model.num_classes else None, columns=4), folder / "samples.png")
    order = "collapse orders of its bank" if model.bank else "random orders"
    return Picture("samples.png", f"Samples, not selected: seed 0, 16 steps, guidance 2, {order}; a row a class.")


def _photos(height: int, width: int) -> Tensor:
    """(2, 3, height, width) in [0, 1]: the photos that come with scikit-learn."""
    from PIL import Image
    from sklearn.datasets import load_sample_image

    names = ("flower.jpg", "china.jpg")
    return torch.stack([photo_tensor(Image.fromarray(load_sample_image(name)), (height, width)) for name in names])
