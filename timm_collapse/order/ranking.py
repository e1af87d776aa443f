"""From a dependency graph to scores of its patches."""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import CollapseError
from .pagerank import check_graph, jump_distribution, pagerank, summable
from .precision import without_autocast

RANKINGS = ("pagerank", "coverage", "in_degree", "transposed")


def rank_graph(
    A: Tensor, ranking: str = "pagerank", damping: float = 0.85, personalization: Tensor | None = None
) -> Tensor:
    """Scores of the patches of dependency graphs; descending scores are the collapse order.

    - "pagerank": the published rule. It is additive: each patch earns by itself, whatever is chosen with it. So it
      ignores redundancy and picks clusters, which is why "coverage" exists.
    - "coverage": greedy maximisation of what the chosen patches explain together (submodular: what is explained
      already earns nothing), see `coverage_scores`.
    - "in_degree": column sums of A (divided by a power of two where they could overflow), the control for what the
      walk of pagerank adds.
    - "transposed": pagerank of A^T, the paper's theorem read literally; ranks dependents high. A control.

    Args:
        A: (B, N, N) or (N, N), non-negative and finite: A[i, j] = influence of patch j on patch i; in [0, 1] for
            "coverage".
        ranking: One of RANKINGS.
        damping: In [0, 1), for the two that walk.
        personalization: (B, N) or (N,), the paper's beta: how much there is to know about each patch. The two that walk
            jump to it, "coverage" and "in_degree" weigh by it what is explained of each patch. Non-negative, finite,
            not all zero; only ratios matter. Uniform by default.

    Returns:
        (B, N) or (N,) scores, higher = earlier, at least float32.

    Raises:
        CollapseError: For an unknown ranking, a wrong A, damping or personalization.
    """
    check_graph(A)
    if ranking == "pagerank":
        return pagerank(A, damping, personalization)
    if ranking == "transposed":
        return pagerank(A.mT, damping, personalization)
    if ranking == "in_degree":
        weighted = A.to(torch.promote_types(A.dtype, torch.float32))
        if personalization is not None:
            weighted = weighted * jump_distribution(weighted, personalization).unsqueeze(-1)
        return summable(weighted, (-2, -1)).sum(dim=-2)
    if ranking == "coverage":
        return coverage_scores(A, personalization)
    raise CollapseError(f"ranking must be one of {', '.join(RANKINGS)}, got {ranking!r}")


@torch.no_grad()
def coverage_scores(A: Tensor, personalization: Tensor | None = None) -> Tensor:
    """Greedy coverage: the next patch j maximises sum_n u_n A[n, j].

    u_n = beta_n times the product over the chosen j of (1 - A[n, j]) is what is still unexplained about patch n, with
    the personalization beta (uniform by default). A patch explains itself
    wholly (the diagonal counts as 1), so it earns its own u_j as well, and u_j = 0 once it is chosen. Equal gains, also
    when all is explained, fall in row-major order. N steps of O(N^2) each; no gradient.

    Args:
        A: (B, N, N) or (N, N) in [0, 1]: A[i, j] = influence of patch j on patch i.
        personalization: (B, N) or (N,), see `rank_graph`.

    Returns:
        (B, N) or (N,): (N - rank) / N, at least float32.

    Raises:
        CollapseError: For a wrong A.

    Source: Nemhauser, Wolsey, Fisher, "Approximations for maximizing submodular set functions", 1978 (the greedy).
    """
    check_graph(A, upper=1)
    graph = A.to(torch.promote_types(A.dtype, torch.float32)).reshape(-1, *A.shape[-2:]).clone()
    graph.diagonal(dim1=1, dim2=2).fill_(1)
    num_graphs, num_patches = graph.shape[:2]
    rows = torch.arange(num_graphs, device=A.device)
    unexplained = graph.new_ones(num_graphs, num_patches)
    if personalization is not None:
        unexplained = jump_distribution(A, personalization).to(graph.dtype).reshape(-1, num_patches)
        unexplained = unexplained / unexplained.amax(dim=1, keepdim=True)
    chosen = torch.zeros(num_graphs, num_patches, dtype=torch.bool, device=A.device)
    scores = torch.empty_like(unexplained)
    with without_autocast(A):  # half products would change close choices
        for step in range(num_patches):
            gains = torch.einsum("bn,bnj->bj", unexplained, graph).masked_fill(chosen, -1)
            best = gains.argmax(dim=1)
            chosen[rows, best] = True
            scores[rows, best] = (num_patches - step) / num_patches
            unexplained = unexplained * (1 - graph[rows, :, best])
            # only the ratios of u matter: rescaled, long products do not underflow and leave the tail to the tie-break
            unexplained = unexplained / unexplained.amax(dim=1, keepdim=True).clamp_min(torch.finfo(graph.dtype).tiny)
    return scores.reshape(A.shape[:-1])
