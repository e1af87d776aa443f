"""What a training step of a CoMAE does."""

from __future__ import annotations

from torch import Tensor, nn

from ..models.comae import CoMAE
from ..order import CollapseError


def alternate(model: CoMAE, images: Tensor, random, num_targets: int) -> tuple[dict, list[nn.Parameter]]:
    """What a training step of a CoMAE does: even steps move the encoder, odd ones the decoder.

    Args:
        model: The CoMAE.
        images: (B, C, H, W).
        random: Source of `rand`, `randn`, `uniform`, and of `done` and `progress` (a `Run`).
        num_targets: Targets an image.

    Returns:
        Arguments of `CoMAE.forward` beside the images, and the parameters that this step must not move.
    """
    b, n = len(images), model.num_patches
    if not 1 <= num_targets <= n:
        raise CollapseError(f"targets: must be in [1, {n}] (the patches of an image), got {num_targets}")
    targets = random.rand(b, n).argsort(1)[:, :num_targets]
    noise = random.randn(b, num_targets, n - 1, model.tokenizer.dim)
    decoder_only = random.progress < model.decoder_first
    train_encoder = not decoder_only and random.done % 2 == 0
    mask = None
    if not train_encoder and (decoder_only or random.uniform() < model.random_share):
        shares = random.rand(b, num_targets, 1)
        mask = (random.rand(b, num_targets, n - 1) < shares).float()
    parts = [model.decoder] if train_encoder else [model.encoder]
    frozen = [p for part in parts for p in part.parameters()]
    return {"targets": targets, "noise": noise, "train_encoder": train_encoder, "mask": mask}, frozen
