"""Dependency graphs of very many patches: a coarse graph, refined inside some of its cells, never written out.

A dense graph of N patches has N^2 entries, 10 GB at 224 x 224 patches. Here a patch depends on the patches of its own
cell one by one, and on those of another cell as one: N s entries for cells of s patches.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import CollapseError, check_grid, describe
from .pagerank import check_damping, check_graph, pagerank
from .precision import without_autocast


class HierarchicalGraph:
    """Dependency graph of the patches of a fine grid.

    Between patches a, b of cells I, J it is coarse[I, J] / s: a cell's influence is shared by its s patches. Inside a
    cell (where the coarse graph has 0, unless it is refined itself) that cell's own graph is added if it is refined;
    else all patches are alike, with the total that a patch of the refined cells has on average.

    Args:
        coarse: (B, n, n), non-negative: A[i, j] = influence of cell j on cell i; or a HierarchicalGraph of n patches,
            which makes one of three or more levels.
        cells: (B, k) long, each row distinct: the cells that are refined.
        inner: (B, k, s, s), non-negative: the graph among the s = p q patches of each, row by row.
        grid: Cells (h, w), n = h w.
        parts: Patches (p, q) in each cell, so that the fine grid is (h p, w q).

    Attributes:
        grid: Of the patches, (h p, w q). num_patches: N = h p w q.

    Raises:
        CollapseError: Graphs, cells or grids of other shapes, or negative or infinite values.
    """

    def __init__(
        self,
        coarse: Tensor | HierarchicalGraph,
        cells: Tensor,
        inner: Tensor,
        grid: tuple[int, int],
        parts: tuple[int, int],
    ):
        self.cell_grid, self.parts = check_grid(grid), check_grid(parts)
        n, s = self.cell_grid[0] * self.cell_grid[1], self.parts[0] * self.parts[1]
        if isinstance(coarse, Tensor):
            check_graph(coarse)
            size = tuple(coarse.shape[:2])
        else:
            size = (coarse.batch, coarse.num_patches)
        if len(size) != 2 or size[1] != n or (isinstance(coarse, Tensor) and coarse.ndim != 3):
            raise CollapseError(
                f"coarse must be a graph (B, {n}, {n}) of the cells of {self.cell_grid}, got {describe(coarse)}"
            )
        if not isinstance(inner, Tensor) or inner.ndim != 4 or inner.shape[0] != size[0] or inner.shape[2:] != (s, s):
            raise CollapseError(f"inner must be graphs of shape ({size[0]}, k, {s}, {s}), got {describe(inner)}")
        if inner.shape[1]:
            check_graph(inner.flatten(0, 1))
        inner = inner.to(torch.promote_types(inner.dtype, torch.float32))
        coarse = coarse.to(inner.dtype) if isinstance(coarse, Tensor) else coarse
        if not isinstance(cells, Tensor) or cells.shape != inner.shape[:2] or cells.dtype != torch.long:
            raise CollapseError(f"cells must be long, of shape {tuple(inner.shape[:2])}, got {describe(cells)}")
        if cells.numel() and not (0 <= cells.min() and cells.max() < n):
            raise CollapseError(f"cells must be in [0, {n}), got {int(cells.min())} to {int(cells.max())}")
        if (cells.sort(1).values.diff(dim=1) == 0).any():
            raise CollapseError("cells must be distinct for each image, got one twice")
        self.coarse, self.cells, self.inner = coarse, cells, inner
        self.grid = (self.cell_grid[0] * self.parts[0], self.cell_grid[1] * self.parts[1])
        self.batch, self.num_patches = size[0], n * s
        self.parts_count = s
        # (B, 1): what a patch of a cell that is not refined depends on in its own cell, in all
        inside = inner.sum(-1, dtype=torch.float64)
        self.typical = inside.mean((1, 2)).view(-1, 1) if inner.shape[1] else inside.new_zeros(len(inner), 1)

    def by_cell(self, values: Tensor) -> Tensor:
        """(B, N), row by row of the fine grid -> (B, n, s), cell by cell."""
        (h, w), (p, q) = self.cell_grid, self.parts
        return values.view(-1, h, p, w, q).transpose(2, 3).reshape(-1, h * w, p * q)

    def by_patch(self, values: Tensor) -> Tensor:
        """Inverse of `by_cell`."""
        (h, w), (p, q) = self.cell_grid, self.parts
        return values.view(-1, h, w, p, q).transpose(2, 3).reshape(-1, h * w * p * q)

    def row_sums(self) -> Tensor:
        """(B, N) float64: on how much each patch depends in all."""
        dense = isinstance(self.coarse, Tensor)
        coarse = self.coarse.sum(-1, dtype=torch.float64) if dense else self.coarse.row_sums()
        inside = self.typical.expand(-1, coarse.shape[1]).unsqueeze(2).repeat(1, 1, self.parts_count)
        inside = self._in_refined(inside, self.inner.sum(-1, dtype=torch.float64))
        return self.by_patch(coarse.unsqueeze(2) + inside)

    def influence(self, values: Tensor) -> Tensor:
        """A^T values, (B, N) -> (B, N), in time and memory linear in N."""
        values = self.by_cell(values)
        totals = values.sum(2)
        if isinstance(self.coarse, Tensor):
            between = torch.einsum("bij,bi->bj", self.coarse, totals)
        else:
            between = self.coarse.influence(totals)
        inside = (self.typical.to(totals.dtype) * totals / self.parts_count).unsqueeze(2).repeat(1, 1, self.parts_count)
        refined = values.gather(1, self._index())
        inside = self._in_refined(inside, torch.einsum("bkst,bks->bkt", self.inner, refined))
        return self.by_patch(between.unsqueeze(2) / self.parts_count + inside)

    def scaled(self, factors: Tensor) -> HierarchicalGraph:
        """All influences times a factor for each image, (B,) float64."""

        def times(values: Tensor) -> Tensor:
            return (values.double() * factors.view(-1, *[1] * (values.ndim - 1))).to(values.dtype)

        coarse = times(self.coarse) if isinstance(self.coarse, Tensor) else self.coarse.scaled(factors)
        return HierarchicalGraph(coarse, self.cells, times(self.inner), self.cell_grid, self.parts)

    def dense(self) -> Tensor:
        """(B, N, N): written out, for small N."""
        unit = torch.eye(self.num_patches, dtype=self.inner.dtype, device=self.inner.device)
        columns = [self.influence(row.expand(self.batch, -1)) for row in unit]
        return torch.stack(columns, 1)

    def _index(self) -> Tensor:
        return self.cells.unsqueeze(2).expand(-1, -1, self.parts_count)

    def _in_refined(self, values: Tensor, refined: Tensor) -> Tensor:
        """(B, n, s) with the refined cells' values (B, k, s) in their places."""
        return values.scatter(1, self._index(), refined)


def hierarchical_pagerank(graph: Tensor | HierarchicalGraph, damping: float = 0.85, tolerance: float = 1e-7) -> Tensor:
    """PageRank of a hierarchical graph by power iteration; of a dense one as `pagerank`.

    Args:
        graph: (B, N, N), or a `HierarchicalGraph`.
        damping: As for `pagerank`.
        tolerance: Largest sum of changes of an image's ranks at which to stop; it also stops where rounding keeps the
            changes from falling.

    Returns:
        (B, N), each row sums to 1.

    Raises:
        CollapseError: As `pagerank`.

    Source: as `pagerank`; the error falls by the factor `damping` an iteration.
    """
    if isinstance(graph, Tensor):
        return pagerank(graph, damping)
    check_damping(damping)
    with without_autocast(graph.inner):
        return _power_iteration(graph, damping, tolerance)


def _power_iteration(graph: HierarchicalGraph, damping: float, tolerance: float) -> Tensor:
    totals = graph.row_sums()
    largest = totals.amax(1)
    if not ((largest > 1e-30) & (largest < 1e30) | (largest == 0)).all():  # products would leave the range of float32
        graph = graph.scaled(1 / largest.masked_fill(largest == 0, 1))
        totals = graph.row_sums()
    ranks = jump = torch.full_like(totals, 1 / graph.num_patches)
    dead, totals = totals == 0, totals.masked_fill(totals == 0, 1)
    change = float("inf")
    while True:
        walk = graph.influence((ranks / totals).to(graph.inner.dtype)).double()
        walk = walk + (ranks * dead).sum(1, keepdim=True) * jump  # who depends on nothing jumps
        last, ranks = ranks, (1 - damping) * jump + damping * walk
        ranks = ranks / ranks.sum(1, keepdim=True)
        before, change = change, float((ranks - last).abs().sum(1).max())
        if change <= tolerance or change >= before:
            return ranks.float()
