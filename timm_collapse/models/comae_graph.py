"""The graphs of a CoMAE: the weights of its encoder, and what the errors of its decoder say of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..order import CollapseError, check_images
from ..order.precision import without_autocast
from .offsets import others
from .transformer import gather_tokens

if TYPE_CHECKING:
    from .comae import CoMAE

ALONE = 2.0
"""How much more a patch tells by itself than its share beside the others, which tell part of it, too: measured."""


@torch.no_grad()
def dependency(model: CoMAE, images: Tensor, max_tokens: int, precision: torch.dtype | None) -> Tensor:
    """See `CoMAE.dependency`."""
    _check(model, images)
    device = images.device
    precision = precision or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    kind = "cpu" if images.is_meta else device.type  # the meta device knows no autocast
    with torch.autocast(kind, torch.bfloat16, enabled=precision is torch.bfloat16):
        tokens = model.tokenizer(images.to(model.log_temperature.dtype))
        graph = torch.zeros(len(images), model.num_patches, model.num_patches, device=device)
        for targets, index in _chunks(model, images, max_tokens):
            graph[:, targets[0]] = graph[:, targets[0]].scatter(2, index, model.weights(tokens, targets))
    return graph


def evidence(model: CoMAE, images: Tensor, max_tokens: int) -> tuple[Tensor, Tensor]:
    """See `CoMAE.evidence`."""
    _check(model, images)
    n = model.num_patches
    with torch.inference_mode(False), torch.enable_grad(), without_autocast(images):
        graph = torch.zeros(len(images), n, n, device=images.device)
        unknown = torch.zeros(len(images), n, device=images.device)
        noise = _noise(model, graph)
        tokens = model.tokenizer(images.detach().clone().to(model.log_temperature.dtype))
        for targets, index in _chunks(model, images, max_tokens):
            truth, some = gather_tokens(tokens, targets), noise.expand(*targets.shape, -1, -1)
            with torch.no_grad():
                weights = model.weights(tokens, targets)
                # all noise: what is then told is the same for all images
                blank = model.decode(torch.zeros_like(tokens[:1]), targets[:1], torch.zeros_like(weights[:1]), some[:1])
                nothing = (blank - truth).abs().mean(-1)
            weights.requires_grad_()
            errors = (model.decode(tokens, targets, weights, some) - truth).abs().mean(-1)
            (slope,) = torch.autograd.grad(errors.sum(), weights)
            with torch.no_grad():
                owed = (-slope * weights).clamp_min(0)
                shares = owed / owed.sum(-1, keepdim=True).clamp_min(torch.finfo(owed.dtype).tiny)
                nothing = nothing.float().clamp_min(1e-3)
                told = (nothing / errors.float().clamp_min(1e-3)).log().clamp_min(0)
                rows = -torch.expm1(-ALONE * told.unsqueeze(-1) * shares)
                graph[:, targets[0]] = graph[:, targets[0]].scatter(2, index, rows)
                unknown[:, targets[0]] = nothing
    return graph, unknown


@torch.no_grad()
def expected(model: CoMAE, images: Tensor, max_tokens: int) -> Tensor:
    """See `CoMAE.expected`."""
    _check(model, images)
    if not model.has_scale:
        raise CollapseError("scale: this CoMAE was built without scale=True, so it expects no error")
    tokens = model.tokenizer(images.to(model.log_temperature.dtype))
    noise = _noise(model, tokens)
    found = [
        model.reconstruct(tokens, targets, model.weights(tokens, targets), noise.expand(*targets.shape, -1, -1))
        for targets, _ in _chunks(model, images, max_tokens)
    ]
    return torch.cat([part.log_scale for part in found], 1).float().exp()


def _noise(model: CoMAE, tokens: Tensor) -> Tensor:
    """The same for all images and targets, (1, 1, N - 1, D): what is measured repeats itself."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, 1, model.num_patches - 1, model.tokenizer.dim, generator=generator).to(tokens)


def _check(model: CoMAE, images: Tensor) -> None:
    check_images(images)
    if tuple(images.shape[-2:]) != (model.img_size, model.img_size):
        raise CollapseError(f"images: expected {model.img_size} x {model.img_size}, got {tuple(images.shape[-2:])}")


def _chunks(model: CoMAE, images: Tensor, max_tokens: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Some targets of all images (B, M), and the positions of their others (B, M, N - 1), again and again."""
    n = model.num_patches
    chunk = max(1, max_tokens // (n * max(1, len(images))))
    for targets in torch.arange(n, device=images.device).split(chunk):
        targets = targets.expand(len(images), -1)
        yield targets, others(targets, n)
