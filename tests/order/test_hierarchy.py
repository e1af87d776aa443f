"""Hierarchical dependency graphs against the dense graph that their definition describes."""

import pytest
import torch

from timm_collapse import CollapseError, pagerank
from timm_collapse.order import HierarchicalGraph, Order, hierarchical_pagerank, spearman


def example(grid=(3, 4), parts=(2, 3), refined=5, images=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    n, s = grid[0] * grid[1], parts[0] * parts[1]
    coarse = torch.rand(images, n, n, generator=generator) ** 3
    coarse.diagonal(dim1=1, dim2=2).zero_()
    cells = torch.rand(images, n, generator=generator).argsort(1)[:, :refined]
    inner = torch.rand(images, refined, s, s, generator=generator) ** 3
    inner.diagonal(dim1=2, dim2=3).zero_()
    return HierarchicalGraph(coarse, cells, inner, grid, parts)


def reference(graph):
    """The definition, entry by entry; `coarse` is a tensor."""
    (h, w), (p, q), s = graph.cell_grid, graph.parts, graph.parts[0] * graph.parts[1]
    num = h * w * s

    def place(n):  # -> cell, place in the cell
        row, column = divmod(n, w * q)
        return row // p * w + column // q, row % p * q + column % q

    dense = torch.zeros(len(graph.cells), num, num)
    for image, cells in enumerate(graph.cells.tolist()):
        typical = sum(float(inner.sum()) for inner in graph.inner[image]) / max(1, len(cells) * s)
        for a in range(num):
            for b in range(num):
                (i, x), (j, y) = place(a), place(b)
                dense[image, a, b] = graph.coarse[image, i, j] / s
                if i == j:
                    dense[image, a, b] += graph.inner[image, cells.index(i), x, y] if i in cells else typical / s
    return dense


def test_dense_is_the_definition():
    for refined in (0, 1, 5, 12):
        graph = example(refined=refined)
        assert graph.grid == (6, 12) and graph.num_patches == 72
        assert torch.allclose(graph.dense(), reference(graph), atol=1e-6)
        assert torch.allclose(graph.row_sums().float(), graph.dense().sum(2), atol=1e-5)


@pytest.mark.parametrize("damping", [0.0, 0.5, 0.85, 0.99])
def test_pagerank_is_that_of_the_dense_graph(damping):
    graph = example()
    exact = pagerank(reference(graph).double(), damping)
    assert torch.allclose(hierarchical_pagerank(graph, damping).double(), exact, rtol=1e-4, atol=0)


def test_ranks_agree_at_1024_patches():
    graph = example(grid=(8, 8), parts=(4, 4), refined=14, images=1)
    sparse, dense = (
        Order.with_spread_ties(r, (32, 32)) for r in (hierarchical_pagerank(graph), pagerank(graph.dense()))
    )
    assert graph.num_patches == 1024 and spearman(sparse, dense).min() > 0.999


def test_three_levels_are_the_dense_graph_refined():
    graph = example(grid=(2, 2), parts=(2, 2), refined=2)
    inner = torch.rand(2, 3, 4, 4)
    cells = torch.tensor([[0, 5, 9], [3, 4, 15]])
    nested = HierarchicalGraph(graph, cells, inner, (4, 4), (2, 2))
    written = HierarchicalGraph(graph.dense(), cells, inner, (4, 4), (2, 2))
    assert nested.grid == (8, 8)
    assert torch.allclose(nested.dense(), reference(written), atol=1e-6)
    assert torch.allclose(hierarchical_pagerank(nested), pagerank(reference(written)), rtol=1e-4)


def test_patches_that_depend_on_nothing():
    coarse = torch.zeros(1, 4, 4)
    coarse[0, 0, 1] = 1.0
    graph = HierarchicalGraph(coarse, torch.zeros(1, 0, dtype=torch.long), torch.zeros(1, 0, 4, 4), (2, 2), (2, 2))
    assert torch.allclose(hierarchical_pagerank(graph), pagerank(reference(graph)), rtol=1e-5)
    assert hierarchical_pagerank(graph)[0].view(4, 4)[:2, 2:].min() > 1 / 16


def test_a_uniform_graph_has_uniform_ranks():
    graph = HierarchicalGraph(torch.ones(1, 6, 6), torch.arange(6)[None], torch.ones(1, 6, 4, 4), (2, 3), (2, 2))
    assert torch.allclose(hierarchical_pagerank(graph), torch.full((1, 24), 1 / 24))


def test_iterations_end_where_rounding_does(monkeypatch):
    calls = []
    own = HierarchicalGraph.influence
    monkeypatch.setattr(HierarchicalGraph, "influence", lambda self, values: calls.append(1) or own(self, values))
    graph = example(grid=(8, 8), parts=(8, 8), refined=14, images=6)
    sharp = hierarchical_pagerank(graph, tolerance=0.0)
    assert 5 < len(calls) < 200
    assert torch.allclose(sharp, hierarchical_pagerank(graph), rtol=1e-5, atol=0)


def test_half_precision_around_it_changes_nothing():
    graph = example()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(hierarchical_pagerank(graph), hierarchical_pagerank(example()))
    assert torch.equal(hierarchical_pagerank(graph), hierarchical_pagerank(example()))
    half = HierarchicalGraph(graph.coarse.bfloat16(), graph.cells, graph.inner.bfloat16(), (3, 4), (2, 3))
    assert hierarchical_pagerank(half).dtype == torch.float32


def test_memory_is_linear_in_the_patches():
    entries = []
    for side in (7, 14, 28):
        graph = example(grid=(side, side), parts=(8, 8), refined=round(0.22 * side**2), images=1)
        entries.append(graph.inner.numel() / graph.num_patches)
        assert torch.allclose(hierarchical_pagerank(graph).sum(1), torch.ones(1))
    assert graph.grid == (224, 224) and max(entries) < 64 * 0.23  # s = 64 a patch where all are refined


def test_bad_graphs_name_what_was_given():
    graph = example()
    coarse, cells, inner = graph.coarse, graph.cells, graph.inner
    cases = [
        ((coarse[:, :5, :5], cells, inner, (3, 4), (2, 3)), r"coarse must be a graph \(B, 12, 12\)"),
        ((coarse[0], cells, inner, (3, 4), (2, 3)), r"coarse must be a graph"),
        ((-coarse, cells, inner, (3, 4), (2, 3)), "non-negative"),
        ((coarse, cells, inner, (3, 4), (2, 2)), r"inner must be graphs of shape \(2, k, 4, 4\)"),
        ((coarse, cells, inner / 0, (3, 4), (2, 3)), "finite"),
        ((coarse, cells[:, :3], inner, (3, 4), (2, 3)), r"cells must be long, of shape \(2, 5\)"),
        ((coarse, cells.float(), inner, (3, 4), (2, 3)), "cells must be long"),
        ((coarse, cells + 8, inner, (3, 4), (2, 3)), r"cells must be in \[0, 12\)"),
        ((coarse, cells * 0, inner, (3, 4), (2, 3)), "distinct"),
        ((coarse, cells, inner, (3, 0), (2, 3)), "grid"),
        ((graph, cells, inner, (3, 4), (2, 3)), r"coarse must be a graph \(B, 12, 12\)"),
    ]
    for arguments, message in cases:
        with pytest.raises(CollapseError, match=message):
            HierarchicalGraph(*arguments)
    with pytest.raises(CollapseError, match="damping"):
        hierarchical_pagerank(graph, 1.0)


@pytest.mark.parametrize("scale", [1e-38, 1e-35, 1e35, 3e38])
def test_the_scale_of_an_image_has_no_effect(scale):
    def built(factor):
        graph, inner = example(), torch.rand(2, 4, 4, 4, generator=torch.Generator().manual_seed(1))
        factors = torch.tensor([1.0, factor]).view(2, 1, 1)
        coarse = HierarchicalGraph(
            graph.coarse * factors, graph.cells, graph.inner * factors.unsqueeze(1), graph.cell_grid, graph.parts
        )
        cells = torch.arange(4).expand(2, -1)
        return coarse, HierarchicalGraph(coarse, cells, inner * factors.unsqueeze(1), coarse.grid, (2, 2))

    for graph, expected in zip(built(scale), built(1.0)):
        torch.testing.assert_close(hierarchical_pagerank(graph), hierarchical_pagerank(expected), atol=1e-6, rtol=1e-3)
    uniform = HierarchicalGraph(
        torch.full((1, 6, 6), scale), torch.arange(6)[None], torch.full((1, 6, 4, 4), scale), (2, 3), (2, 2)
    )
    torch.testing.assert_close(hierarchical_pagerank(uniform), torch.full((1, 24), 1 / 24))
