"""What a training step of a CoMAE does."""

from __future__ import annotations

from torch import Tensor, nn

from ..models.comae import CoMAE
from ..order import CollapseError


def alternate(model: CoMAE, images: Tensor, run, num_targets: int) -> tuple[dict, list[nn.Parameter]]:
    """What a training step of a CoMAE does: even steps move the encoder, odd ones the decoder.

    Args:
        model: The CoMAE.
        images: (B, C, H, W).
        run: The `Run`: its `random`, and how far it is (`done`, `progress`).
        num_targets: Targets an image.

    Returns:
        Arguments of `CoMAE.forward` beside the images, and the parameters that this step must not move.
    """
    b, n = len(images), model.num_patches
    if not 1 <= num_targets <= n:
        raise CollapseError(f"targets: must be in [1, {n}] (the patches of an image), got {num_targets}")
    targets = run.random.rand(b, n).argsort(1)[:, :num_targets]
    noise = run.random.randn(b, num_targets, n - 1, model.tokenizer.dim)
    decoder_only = run.progress < model.decoder_first
    train_encoder = not decoder_only and run.done % 2 == 0
    mask = None
    if not train_encoder and (decoder_only or run.random.uniform() < model.random_share):
        shares = run.random.rand(b, num_targets, 1)
        mask = (run.random.rand(b, num_targets, n - 1) < shares).float()
    parts = [model.decoder] if train_encoder else [model.encoder]
    frozen = [p for part in parts for p in part.parameters()]
    return {"targets": targets, "noise": noise, "train_encoder": train_encoder, "mask": mask}, frozen
