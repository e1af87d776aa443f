"""PageRank of batches of dense graphs."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .errors import CollapseError, describe, values_readable


def pagerank(A: Tensor, damping: float = 0.85, personalization: Tensor | None = None) -> Tensor:
    """PageRank, solved exactly: r = (1 - c) b + c P^T r, with P the row-normalised A.

    The walk goes from a patch to the patches that it depends on, so that those which others depend on rank high. It
    leaves a patch that depends on nothing (a zero row) to where it also jumps: by the personalization b. The diagonal
    counts as it is given. Differentiable with respect to A and personalization.

    Args:
        A: (B, N, N) or (N, N), non-negative and finite: A[i, j] = influence of j on i. The scale of a row has
            no effect.
        damping: The probability c in [0, 1) to follow the graph instead of jumping.
        personalization: (N,) or (B, N), where the jumps go: non-negative, finite, not all zero; normalised here.
            Uniform by default.

    Returns:
        (B, N) or (N,), each row sums to 1; in the precision of A, at least float32.

    Raises:
        CollapseError: For anything else than the above.

    Source: Page et al., "The PageRank Citation Ranking", 1999; zero rows as in networkx.pagerank.
    """
    check_graph(A)
    check_damping(damping)
    A = A.to(torch.promote_types(A.dtype, torch.float32))
    jump = jump_distribution(A, personalization)

    A = summable(A)
    total = A.sum(dim=-1, keepdim=True)
    walk = A / total.masked_fill(total == 0, 1)
    system = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device) - damping * walk.mT
    ranks = torch.linalg.solve(system, jump.unsqueeze(-1)).squeeze(-1)
    # what zero rows lose would come back along the jumps: the same solution, longer by a factor, which cancels here
    return ranks / ranks.sum(dim=-1, keepdim=True)


def summable(values: Tensor, dim: int | tuple[int, ...] = -1) -> Tensor:
    """Non-negative values, divided by a power of two where their sums along `dim` could overflow.

    Elsewhere they stay as they are, bit for bit.
    """
    if values.numel() == 0:
        return values
    exponent = torch.frexp(values.detach().amax(dim, keepdim=True)).exponent
    limit = math.frexp(torch.finfo(values.dtype).max)[1] - 2 - values.numel().bit_length()
    return torch.ldexp(values, (limit - exponent).clamp(max=0))


def check_damping(damping: float) -> None:
    """Raises CollapseError unless a damping is in [0, 1)."""
    if not 0 <= damping < 1:
        raise CollapseError(f"damping must be in [0, 1), got {damping}")


def jump_distribution(A: Tensor, personalization: Tensor | None) -> Tensor:
    """A checked personalization as a distribution, in the shape of PageRank's result; uniform for None."""
    if personalization is None:
        return A.new_full(A.shape[:-1], 1 / A.shape[-1])
    shapes = {tuple(A.shape[-1:]), tuple(A.shape[:-1])}
    if not isinstance(personalization, Tensor) or tuple(personalization.shape) not in shapes:
        allowed = " or ".join(map(str, sorted(shapes, key=len)))
        raise CollapseError(f"personalization must be a tensor of shape {allowed}, got {describe(personalization)}")
    jump = summable(personalization.to(torch.promote_types(personalization.dtype, A.dtype)))
    if values_readable(jump):
        if not (jump.isfinite().all() and (jump >= 0).all()):
            raise CollapseError(
                f"personalization must be non-negative and finite, got values in "
                f"[{jump.min().item():.4g}, {jump.max().item():.4g}]"
            )
        if (jump.amax(dim=-1) == 0).any():
            raise CollapseError("personalization must not be all zero, got only zeros for at least one graph")
    return (jump / jump.sum(dim=-1, keepdim=True)).to(A.dtype).expand(A.shape[:-1])


def check_graph(A: Tensor, upper: float | None = None) -> None:
    """Checks a dependency graph.

    Args:
        A: (B, N, N) or (N, N) floating point, finite, non-negative, N at least 1.
        upper: The largest value that is allowed, where there is one.

    Raises:
        CollapseError: For anything else.
    """
    if not isinstance(A, Tensor) or A.ndim not in (2, 3) or A.shape[-1] != A.shape[-2] or A.shape[-1] == 0:
        raise CollapseError(f"A must be square matrices of shape (B, N, N) or (N, N), got {describe(A)}")
    if not A.is_floating_point():
        raise CollapseError(f"A must be floating point, got {describe(A)}")
    if values_readable(A) and A.numel():
        low, high = (extreme.item() for extreme in A.detach().aminmax())  # NaN comes through both
        if not (0 <= low and high < float("inf")):
            raise CollapseError(f"A must be non-negative and finite, got values in [{low:.4g}, {high:.4g}]")
        if upper is not None and high > upper:
            raise CollapseError(f"A must be in [0, {upper:g}], got values in [{low:.4g}, {high:.4g}]")
