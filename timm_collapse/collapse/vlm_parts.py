"""Parts of vision-language models, and what their inputs must be."""

from __future__ import annotations

import sys

from torch import Tensor, nn

from ..order import CollapseError
from ..order.errors import describe

POSITIONS = ("keep", "close")
"""What becomes of the positions of dropped tokens: gaps, or the tokens behind close up."""


def core(model: nn.Module) -> nn.Module:
    """The model without the language head."""
    return getattr(model, "model", model)


def transformers_module(module: nn.Module):
    """The file of transformers that defines a module's class: its helpers are used as it uses them."""
    return next(sys.modules[c.__module__] for c in type(module).__mro__ if c.__module__.startswith("transformers."))


def check_positions(positions: str, closes_up: bool) -> None:
    """Raises CollapseError unless a family's positions can be treated so."""
    if positions not in POSITIONS:
        raise CollapseError(f"positions must be one of {', '.join(POSITIONS)}, got {positions!r}")
    if positions == "close" and not closes_up:
        raise CollapseError("positions must be 'keep' where they are places in the image (Qwen-VL), got 'close'")


def images_of_size(images: Tensor, size: tuple[int, int]) -> Tensor:
    """The images; raises CollapseError unless they are (B, C, *size)."""
    if not isinstance(images, Tensor) or images.ndim != 4:
        raise CollapseError(f"pixel_values must be a tensor of shape (B, C, H, W), got {describe(images)}")
    if tuple(images.shape[-2:]) != size:
        raise CollapseError(
            f"pixel_values must be {size} pixels, the tower's image_size, got {tuple(images.shape[-2:])}: was the "
            "processor made for this model?"
        )
    return images


def refuse_other_images(placeholders: Tensor, counts: list[int], token: int) -> None:
    """Raises CollapseError unless texts have the placeholders, (B, L) bool, of their images, each in one piece."""
    places = placeholders.flatten().nonzero().flatten().tolist()
    whose = "was the text made for these images by this model's processor?"
    if len(places) != sum(counts):
        raise CollapseError(
            f"input_ids must hold {sum(counts)} image tokens ({token}), one for each cell of the {len(counts)} images, "
            f"got {len(places)}: {whose}"
        )
    end = 0
    for i, count in enumerate(counts):
        start, end = end, end + count
        if count and places[end - 1] - places[start] + 1 != count:
            raise CollapseError(f"input_ids must hold the {count} image tokens of image {i} in one piece: {whose}")
