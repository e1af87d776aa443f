"""Orders that a ViT makes of its own patches, without training: k-centre, a determinantal point process, attention.

They are measured beside the orderers of the package by `benchmarks/real_vit.py`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from timm_collapse import CollapseError, Order


@torch.no_grad()
def patch_embeddings(vit, images: Tensor) -> Tensor:
    """(B, N, D): unit embeddings of the patches, without positions."""
    tokens = vit.patch_embed(images)
    return torch.nn.functional.normalize(tokens.flatten(1, 2) if tokens.ndim == 4 else tokens, dim=-1)


def k_centre(embeddings: Tensor, count: int) -> Tensor:
    """Greedy k-centre (Gonzalez 1985): always the patch that is farthest from those chosen.

    Args:
        embeddings: (B, N, D) unit vectors.
        count: Patches to choose, 1 to N. The first is the one that is farthest from the mean.

    Returns:
        (B, count) long, in the order they are chosen.
    """
    rows = torch.arange(len(embeddings))
    chosen = [(embeddings @ embeddings.mean(1).unsqueeze(-1)).squeeze(-1).argmin(1)]
    nearest = torch.full(embeddings.shape[:2], -float("inf"))  # largest cosine to a chosen patch
    while len(chosen) < count:
        likeness = (embeddings @ embeddings[rows, chosen[-1]].unsqueeze(-1)).squeeze(-1)
        nearest = torch.maximum(nearest, likeness).scatter(1, torch.stack(chosen, 1), float("inf"))
        chosen.append(nearest.argmin(1))
    return torch.stack(chosen, 1)


def greedy_dpp(kernel: Tensor, count: int) -> Tensor:
    """Greedy MAP of a determinantal point process (Chen et al., arXiv 1709.05135, algorithm 1).

    Each time, the item with the largest variance that is left after conditioning on those chosen, as a DPP of
    similarities prunes visual tokens (CDPruner, arXiv 2506.10967).

    Args:
        kernel: (B, N, N) positive semidefinite.
        count: Items to choose, 1 to N.

    Returns:
        (B, count) long, in the order they are chosen.
    """
    rows = torch.arange(len(kernel))
    left = kernel.diagonal(dim1=1, dim2=2).clone()
    loadings = kernel.new_zeros(*kernel.shape[:2], count)
    chosen: list[Tensor] = []
    for i in range(count):
        best = left.argmax(1)
        chosen.append(best)
        scale = left[rows, best].clamp_min(1e-10).sqrt().unsqueeze(1)
        explained = (loadings @ loadings[rows, best].unsqueeze(-1)).squeeze(-1)
        loading = (kernel[rows, best] - explained) / scale
        loadings[:, :, i] = loading
        left = (left - loading.square()).scatter(1, torch.stack(chosen, 1), -float("inf"))
    return torch.stack(chosen, 1)


@torch.no_grad()
def class_attention(vit, images: Tensor) -> Tensor:
    """(B, N): attention of the class token to the patches in the last block, mean over heads; needs the whole pass.

    Raises:
        CollapseError: A ViT without class token, or whose attention is not timm's plain one.
    """
    attention = vit.blocks[-1].attn
    if not getattr(vit, "has_class_token", False) or not hasattr(attention, "qkv"):
        raise CollapseError(f"orders: class-attention needs a ViT with a class token, got {type(vit).__name__}")
    inputs: list[Tensor] = []
    handle = attention.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    try:
        vit.forward_features(images)
    finally:
        handle.remove()
    q, k, _ = attention.qkv(inputs[0]).unflatten(2, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    q, k = attention.q_norm(q[:, :, :1]), attention.k_norm(k)
    return (attention.scale * q @ k.mT).float().softmax(-1).mean(1)[:, 0, vit.num_prefix_tokens :]


def _chosen_first(chosen: Tensor, grid: tuple[int, int]) -> Order:
    """The order that begins with the chosen patches."""
    scores = torch.zeros(len(chosen), grid[0] * grid[1])
    return Order(scores.scatter(1, chosen, torch.arange(chosen.shape[1], 0.0, -1).expand(chosen.shape)), grid)


def by_k_centre(vit, images: Tensor, count: int) -> Order:
    """The first `count` patches by `k_centre`."""
    embeddings = patch_embeddings(vit, images).float()
    with torch.autocast(images.device.type, enabled=False):
        return _chosen_first(k_centre(embeddings, count), tuple(vit.patch_embed.grid_size))


def by_dpp(vit, images: Tensor, count: int) -> Order:
    """The first `count` patches by `greedy_dpp` of their cosines."""
    embeddings = patch_embeddings(vit, images).float()
    with torch.autocast(images.device.type, enabled=False):
        return _chosen_first(greedy_dpp(embeddings @ embeddings.mT, count), tuple(vit.patch_embed.grid_size))


def by_class_attention(vit, images: Tensor, count: int) -> Order:
    """All patches by `class_attention`."""
    return Order(class_attention(vit, images), tuple(vit.patch_embed.grid_size))


OWN_ORDERS: dict[str, Callable[..., Order]] = {
    "k-centre": by_k_centre,
    "dpp": by_dpp,
    "class-attention": by_class_attention,
}
"""Name -> (plain ViT, its images, patches that are needed) -> their order."""
