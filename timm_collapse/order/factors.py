"""Orders under a factor model of one image's uncertainty.

Each patch is a loading on r latent factors of the image plus a part of its own: x_n = g_n . z + sqrt(d_n) e_n with
independent unit normals. So the covariance of the patches is G G^T + diag(d): what two patches share is known once,
whichever of them is seen. Seeing a patch is Bayesian linear regression on z.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import CollapseError
from .precision import without_autocast
from .sorting import stable_argsort, stable_sort


def expected_errors(loadings: Tensor, noise: Tensor, revealed: Tensor) -> Tensor:
    """Standard deviation left in every patch once sets of patches are revealed.

    Args:
        loadings: (B, N, r), g.
        noise: (B, N), d > 0.
        revealed: (B, C, N) bool: C sets per image; or the shares of patches that are revealed, in [0, 1].

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
    deviation, shared = dependencies(loadings, noise)
    deviation = deviation.unsqueeze(1)
    return torch.cat([deviation, deviation * (1.0 - shared).clamp_min(1e-6).sqrt()], 1)


def dependencies(loadings: Tensor, noise: Tensor, kernel: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The dependency graph of a factor model.

    Args:
        loadings: (B, N, r).
        noise: (B, N), > 0.
        kernel: (N, N), see `parallel_picks`; None: nothing is shared by places alone.

    Returns:
        deviation (B, N), the standard deviation of each patch, and graph (B, N, N): rho_ij^2, the share of the variance
        of patch i that patch j alone explains, 0 on the diagonal. Differentiable.
    """
    g = loadings.float()
    with without_autocast(g):
        covariance = torch.bmm(g, g.mT)
        variance = covariance.diagonal(dim1=1, dim2=2) + noise.float()
        shared = covariance.square() / variance.unsqueeze(1) / variance.unsqueeze(2)
        if kernel is not None:
            shared = shared + (1.0 - shared) * kernel.float()
        return variance.sqrt(), shared * (1.0 - torch.eye(shared.shape[1], device=shared.device))


@torch.no_grad()
def parallel_picks(
    loadings: Tensor,
    noise: Tensor,
    revealed: Tensor | None = None,
    rounds: int = 3,
    weights: Tensor | None = None,
    kernel: Tensor | None = None,
    candidates: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The next patches of an order, all at once: the gain of each is damped by what those ahead of it tell of it.

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
        kernel: (N, N) in [0, 1), see `neighbour_kernel`: what two patches share by their places alone, beside rho^2 and
            independent of it. None: nothing.
        candidates: Shares are worked out for so many patches, those that gain most. At most as many as are hidden.
            None: for all.

    Returns:
        (B, candidates) long, the candidates, best first; and (B, N - candidates), the others, by their gain, the
        revealed ones last.
    """
    g = loadings.float()
    with without_autocast(g):
        length = torch.linalg.vector_norm(g, dim=-1)
        deviation = torch.addcmul(noise.float(), length, length).sqrt()
        g, ones = g / deviation.unsqueeze(-1), torch.ones_like(deviation).unsqueeze(-1)
        kernel = torch.eye(g.shape[1], device=g.device) if kernel is None else kernel.float()
        shared = torch.lerp(torch.bmm(g, g.mT).square(), ones, kernel)  # 1 - (1 - rho^2)(1 - k)
        hidden = deviation if weights is None else deviation * weights
        hidden = hidden if revealed is None else hidden.masked_fill(revealed, 0.0)
        column = hidden.unsqueeze(-1)  # half of it comes from the diagonal, which is 1
        gains = torch.baddbmm(column, shared, column, beta=0.5, alpha=0.5).squeeze(-1)
        if revealed is not None:
            gains = gains.masked_fill(revealed, -1.0)
        values, order = stable_sort(gains, descending=True)
        values, ahead, others = values[:, :candidates], order[:, :candidates], order[:, candidates:]
        step, ones = ahead, ones[:, :candidates]
        for left in reversed(range(rounds)):
            index = step.unsqueeze(-1)
            shared = shared.gather(1, index.expand(-1, -1, shared.shape[2]))  # [j, i], in the order so far
            shared = shared.gather(2, index.mT.expand(-1, shared.shape[1], -1))
            share = _substitute(shared.tril(-1), ones).squeeze(-1)
            if not left and revealed is not None and candidates is None:
                share = share.clamp_min(1e-4)  # the revealed ones, with values below 0, stay last
            step = stable_argsort(values * share, descending=True)
            ahead = ahead.gather(1, step)
            if left:
                values = values.gather(1, step)
        return ahead, others


def neighbour_kernel(grid: tuple[int, int], strength: float) -> Tensor:
    """What two patches share by their places alone: strength exp(-d^2 / 2) at a distance of d patches, and 1 for d = 0.

    A model of few factors has none for each patch and its neighbours, which every image makes alike.

    Args:
        grid: Patch grid (h, w).
        strength: In [0, 1); 0: nothing.

    Returns:
        (N, N), for `parallel_picks`.
    """
    if not 0 <= strength < 1:
        raise CollapseError(f"strength must be in [0, 1), got {strength}")
    rows = torch.arange(grid[0]).repeat_interleave(grid[1])
    columns = torch.arange(grid[1]).repeat(grid[0])
    squares = sum((x.unsqueeze(0) - x.unsqueeze(1)).square() for x in (rows, columns))
    return torch.where(squares == 0, 1.0, strength * torch.exp(squares / -2.0))


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
