"""Greedy order under a factor model of one image's uncertainty.

Each patch is a loading on r latent factors of the image plus a part of its own: x_n = g_n . z + sqrt(d_n) e_n with
independent unit normals. So the covariance of the patches is G G^T + diag(d): what two patches share is known once,
whichever of them is seen. Seeing a patch is Bayesian linear regression on z, and nothing needs an N x N matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .precision import without_autocast


def expected_errors(loadings: Tensor, noise: Tensor, revealed: Tensor) -> Tensor:
    """Standard deviation left in every patch once sets of patches are revealed.

    Args:
        loadings: (B, N, r), g.
        noise: (B, N), d > 0.
        revealed: (B, C, N) bool: C sets per image.

    Returns:
        (B, C, N), 0 where revealed. Differentiable.
    """
    known = revealed.float()
    conditioned = condition(loadings, noise, revealed)
    return (conditioned.square().sum(-1) + noise.float().unsqueeze(1)).sqrt() * (1.0 - known)


def condition(loadings: Tensor, noise: Tensor, revealed: Tensor) -> Tensor:
    """Loadings on the factors as they are left once sets of patches are revealed.

    The posterior covariance of the factors is (I + G_S' D_S^-1 G_S)^-1 = (L L')^-1, so L^-1 g_n are loadings on
    factors of unit variance again.

    Args:
        loadings: (B, N, r).
        noise: (B, N), > 0.
        revealed: (B, C, N) bool.

    Returns:
        (B, C, N, r), float32. Differentiable.
    """
    g, weight = loadings.float(), revealed.float() / noise.float().unsqueeze(1)
    with without_autocast(g):  # half products would not stay positive definite
        information = torch.einsum("bcn,bnr,bns->bcrs", weight, g, g) + torch.eye(g.shape[-1], device=g.device)
        transposed = g.mT.unsqueeze(1).expand(-1, revealed.shape[1], -1, -1)
        if torch.onnx.is_in_onnx_export():
            return _whiten(information, transposed).mT
        factor = torch.linalg.cholesky(information)
        return torch.linalg.solve_triangular(factor, transposed, upper=False).mT


def _whiten(matrix: Tensor, vectors: Tensor) -> Tensor:
    """L^-1 V for the Cholesky factor L of a matrix, by r steps of elimination: ONNX has no Cholesky.

    Args:
        matrix: (..., r, r), symmetric, positive definite.
        vectors: (..., r, N), V.
    """
    rows, done = torch.cat([matrix, vectors], -1), []
    for _ in range(matrix.shape[-1]):
        first = rows[..., :1, :] / rows[..., :1, :1].sqrt()
        done.append(first[..., -vectors.shape[-1] :])
        multiples = first[..., 1 : rows.shape[-2]].mT  # what is left stays symmetric
        rows = rows[..., 1:, 1:] - multiples * first[..., 1:]
    return torch.cat(done, -2)


@torch.no_grad()
def greedy_factor_order(loadings: Tensor, noise: Tensor, revealed: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The next patches, each the one that removes most expected error.

    The gain of patch j is its own standard deviation plus what it removes from the others, to first order in their
    variances: sum_n C_nj^2 / (2 s_n v_j). Factors are conditioned on each pick by a symmetric square-root update, which
    costs O(N r), so a pick costs O(N r^2).

    Args:
        loadings: (B, N, r).
        noise: (B, N), > 0.
        revealed: (B, N) bool: already visible: conditioned on, and not picked again.
        count: Patches to pick, at most those that are left in every image.

    Returns:
        indices (B, count), best first, and the gains (B, N) that remain after the last pick (-1 where revealed).
    """
    g, d = condition(loadings, noise, revealed.unsqueeze(1)).squeeze(1), noise.float()
    shown = revealed.clone()
    picks = []
    with without_autocast(g):
        gains = _pick(g, d, shown, count, picks)
    indices = torch.stack(picks, 1) if picks else torch.empty(g.shape[0], 0, dtype=torch.long, device=g.device)
    return indices, gains


def _pick(g: Tensor, d: Tensor, shown: Tensor, count: int, picks: list[Tensor]) -> Tensor:
    """Append `count` greedy picks; returns the gains that remain. Changes `shown`."""
    rows = torch.arange(g.shape[0], device=g.device)
    for step in range(count + 1):
        shared = g.square().sum(-1)
        deviation = (shared + d).sqrt()
        weight = (0.5 / deviation).masked_fill(shown, 0.0)
        moment = torch.bmm((g * weight.unsqueeze(-1)).mT, g)  # (B, r, r)
        others = (torch.bmm(g, moment) * g).sum(-1) - weight * shared.square()
        gains = (deviation + others / (shared + d)).masked_fill(shown, -1.0)
        if step == count:
            return gains
        best = gains.argmax(1)
        picks.append(best)
        shown[rows, best] = True
        pick, own = g[rows, best], d[rows, best].unsqueeze(-1)
        length = pick.square().sum(-1, keepdim=True).clamp_min(1e-12)
        # (I - b p p^T)^2 = I - p p^T / (|p|^2 + d): conditions on the pick without a matrix inverse
        b = (1.0 - (own / (length + own)).sqrt()) / length
        g = g - torch.bmm(g, pick.unsqueeze(-1)) * (b * pick).unsqueeze(1)
