"""Draft, then reorder: the collapse order of an image that does not exist yet, from a cheap draft of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..order import CollapseError, Order
from .codec import PixelCodec, VaeCodec
from .mar import MAR
from .normalisation import Normalisation
from .orderer import CollapseOrder

DRAFT_DIFFUSION_STEPS = 10


@torch.no_grad()
def draft_order(
    mar: MAR,
    codec: PixelCodec | VaeCodec,
    orderer: CollapseOrder,
    labels: Tensor | Sequence[int],
    steps: int = 8,
    diffusion_steps: int | tuple[int, int] = DRAFT_DIFFUSION_STEPS,
    generator: torch.Generator | None = None,
    latents: Tensor | None = None,
    regenerate: Tensor | None = None,
) -> Order:
    """Generate a draft in a few steps without guidance, and order its patches.

    Args:
        mar: The generator; the draft follows its default order.
        codec: What its latents are of.
        orderer: Any; all three on one device.
        labels: (B,) classes, as of `MAR.generate`.
        steps: Iterations of the draft, in [1, number of tokens].
        diffusion_steps: Of the draft.
        generator: All randomness of the draft.
        latents, regenerate: As of `MAR.generate`: the draft fills in the tokens to regenerate.

    Returns:
        B orders on `mar.grid`, for `mar.generate(labels, order=...)`.

    Raises:
        CollapseError: As `MAR.generate`, or for an orderer that is none.
    """
    if not isinstance(orderer, CollapseOrder):
        raise CollapseError(f"orderer: must be a CollapseOrder, got {type(orderer).__name__}")
    drafts = mar.generate(
        labels, steps, generator=generator, diffusion_steps=diffusion_steps, latents=latents, regenerate=regenerate
    )
    images = codec.decode(drafts)
    return orderer(Normalisation.of(orderer).apply(images), grid=mar.grid)
