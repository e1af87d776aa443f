"""Orders under a factor model of one image's uncertainty.

Each patch is a loading on r latent factors of the image plus a part of its own: x_n = g_n . z + sqrt(d_n) e_n with
independent unit normals. So the covariance of the patches is G G^T + diag(d): what two patches share is known once,
whichever of them is seen. Seeing a patch is Bayesian linear regression on z.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .order import stable_argsort, stable_sort
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
    g, weight = loadings.float(), revealed / noise.float().unsqueeze(1)
    with without_autocast(g):  # half products would not stay positive definite
        information = torch.einsum("bcn,bnr,bns->bcrs", weight, g, g)
        transposed = g.mT.unsqueeze(1).expand(-1, revealed.shape[1], -1, -1)
        if torch.onnx.is_in_onnx_export():
            return _whiten(information + torch.eye(g.shape[-1]), transposed).mT
        information.diagonal(dim1=-2, dim2=-1).add_(1.0)
        factor = torch.linalg.cholesky_ex(information).L  # its checks would read a value back from the device
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


def single_errors(loadings: Tensor, noise: Tensor) -> Tensor:
    """Standard deviation of every patch, and what is left of it once any one other patch is revealed.

    Args:
        loadings: (B, N, r).
        noise: (B, N), > 0.

    Returns:
        (B, 1 + N, N): first s, that of every patch; then for each patch j that is revealed s_n sqrt(1 - rho_nj^2), with
        rho the correlation of two patches, but for n = j, where it stays s_j. Differentiable.
    """
    deviation, shared = _correlations(loadings, noise)
    others = 1.0 - torch.eye(shared.shape[1], device=shared.device)
    deviation = deviation.unsqueeze(1)
    return torch.cat([deviation, deviation * (1.0 - shared * others).clamp_min(1e-6).sqrt()], 1)


def _correlations(loadings: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Standard deviations (B, N), and squared correlations of the factors' parts of two patches (B, N, N)."""
    g = loadings.float()
    with without_autocast(g):
        covariance = torch.bmm(g, g.mT)
        variance = covariance.diagonal(dim1=1, dim2=2) + noise.float()
        return variance.sqrt(), covariance.square() / variance.unsqueeze(1) / variance.unsqueeze(2)


@torch.no_grad()
def parallel_order(
    loadings: Tensor,
    noise: Tensor,
    revealed: Tensor | None = None,
    rounds: int = 3,
    weights: Tensor | None = None,
) -> Tensor:
    """An order of the patches, all at once: the gain of each is damped by what those ahead of it tell of it.

    The gain of patch j is its own standard deviation plus what it removes from the others, to first order in their
    variances: sum_n s_n rho_nj^2 / 2. It counts as far as the patch is still unknown when its turn comes: its share is
    1 - sum_i share_i rho_ij^2 over the patches i ahead of it, a triangular system. Ahead is first what gains more, then
    what has the larger product of gain and share. ("Matrix NMS" damps once, by the largest rho_ij^2: Wang et al.,
    SOLOv2, 2020, arXiv 2003.10152.) In an order made in a few phases that is as good as greedy choice, without a step
    for every patch.

    Args:
        loadings: (B, N, r), of what is unknown where the revealed patches are known.
        noise: (B, N), > 0.
        revealed: (B, N) bool: already visible; None: nothing is.
        rounds: How often shares are computed, each time in the order that the last ones gave.
        weights: (B, N), >= 0: by how much the deviation of each patch counts in all gains; None: 1 each.

    Returns:
        (B, N) long: best first, the revealed ones last.
    """
    deviation, shared = _correlations(loadings, noise)
    with without_autocast(deviation):
        hidden = deviation if weights is None else deviation * weights
        hidden = hidden if revealed is None else hidden.masked_fill(revealed, 0.0)
        own = torch.addcmul(hidden, hidden, shared.diagonal(dim1=1, dim2=2), value=-0.5)  # counts wholly, not twice
        gains = torch.baddbmm(own.unsqueeze(-1), shared, hidden.unsqueeze(-1), alpha=0.5).squeeze(-1)
        if revealed is not None:
            gains = gains.masked_fill(revealed, -1.0)
        values, order = stable_sort(gains, descending=True)
        ones, step = torch.ones_like(values).unsqueeze(-1), order
        for left in reversed(range(rounds)):
            index = step.unsqueeze(-1).expand_as(shared)
            shared = shared.gather(1, index).gather(2, index.mT)  # [j, i], in the order so far
            share = _substitute(shared.tril(-1), ones).squeeze(-1)
            if not left and revealed is not None:
                share = share.clamp_min(1e-4)  # the revealed ones, with values below 0, stay last
            step = stable_argsort(values * share, descending=True)
            order = order.gather(1, step)
            if left:
                values = values.gather(1, step)
        return order


def _substitute(lower: Tensor, right: Tensor) -> Tensor:
    """x of (I + L) x = b, with a strictly lower triangular L (B, N, N) and b (B, N, 1).

    ONNX cannot solve: there by blocks of rows. The inverse of a block I + P of s rows is (I - P)(I + P^2)(I + P^4) ...,
    until the power s, which is 0.
    """
    if not torch.onnx.is_in_onnx_export():
        return torch.linalg.solve_triangular(lower, right, upper=False, unitriangular=True)
    n = right.shape[1]
    size = max(s for s in range(1, 9) if n % s == 0)
    power = -torch.stack([lower[:, i : i + size, i : i + size] for i in range(0, n, size)], 1)
    inverse = torch.eye(size) + power
    for _ in range((size - 1).bit_length() - 1):
        power = power @ power
        inverse = inverse + inverse @ power
    found = inverse[:, 0] @ right[:, :size]
    for block, i in enumerate(range(size, n, size), 1):
        left = right[:, i : i + size] - lower[:, i : i + size, :i] @ found
        found = torch.cat([found, inverse[:, block] @ left], 1)
    return found
