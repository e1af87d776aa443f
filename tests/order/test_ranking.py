"""rank_graph: each ranking against a slow or closed form, and the reason why coverage exists."""

import pytest
import torch

from timm_collapse.order import RANKINGS, CollapseError, pagerank, rank_graph


def random_graph(batch=3, patches=14, seed=0):
    return torch.rand(batch, patches, patches, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def slow_coverage(graph, beta=None):
    """The greedy of the definition, in plain Python: the list of patches, best first."""
    n = len(graph)
    graph = [[1.0 if i == j else float(graph[i][j]) for j in range(n)] for i in range(n)]
    unexplained, chosen = beta or [1.0] * n, []
    while len(chosen) < n:
        gains = {j: sum(unexplained[i] * graph[i][j] for i in range(n)) for j in range(n) if j not in chosen}
        best = max(gains, key=gains.get)
        chosen.append(best)
        unexplained = [u * (1 - graph[i][best]) for i, u in enumerate(unexplained)]
        assert unexplained[best] == 0
    return chosen


def descending(scores):
    return scores.argsort(dim=-1, descending=True, stable=True).tolist()


@pytest.mark.parametrize("power", [1, 4])
def test_coverage_against_plain_python(power):
    graph = random_graph() ** power
    scores = rank_graph(graph, "coverage")
    assert descending(scores) == [slow_coverage(one.tolist()) for one in graph]
    assert scores.sort(dim=1).values[0].tolist() == pytest.approx([(n + 1) / 14 for n in range(14)])


def test_rankings_weigh_what_is_explained_by_how_much_there_is_to_know():
    graph, beta = random_graph(), torch.rand(3, 14, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = {ranking: rank_graph(graph, ranking, personalization=7 * beta) for ranking in RANKINGS}
    slow = [slow_coverage(one.tolist(), weights) for one, weights in zip(graph, beta.tolist())]
    assert descending(found["coverage"]) == slow
    weighted = torch.einsum("bn,bnj->bj", beta / beta.sum(1, keepdim=True), graph)
    torch.testing.assert_close(found["in_degree"], weighted)
    assert torch.equal(found["pagerank"], pagerank(graph, personalization=7 * beta))
    assert torch.equal(found["transposed"], pagerank(graph.mT, personalization=7 * beta))
    for ranking, scores in found.items():
        assert descending(scores) != descending(rank_graph(graph, ranking))
        even = rank_graph(graph, ranking, personalization=torch.full((14,), 3.0))
        assert descending(even) == descending(rank_graph(graph, ranking))
        with pytest.raises(CollapseError, match="personalization must be non-negative"):
            rank_graph(graph, ranking, personalization=-beta)


def test_coverage_avoids_the_cluster_that_pagerank_picks():
    # 0, 1, 2 explain the same five patches and each other; 3 explains two others
    graph = torch.zeros(10, 10)
    graph[:3, :3] = 0.9
    graph[4:8, :3] = 0.9
    graph[8:, 3] = 0.9
    assert set(descending(rank_graph(graph, "pagerank"))[:3]) == {0, 1, 2}
    assert descending(rank_graph(graph, "coverage"))[:2] == [0, 3]


def test_coverage_ignores_the_given_diagonal():
    graph = random_graph()
    cleared = graph.clone()
    cleared.diagonal(dim1=1, dim2=2).zero_()
    assert torch.equal(rank_graph(graph, "coverage"), rank_graph(cleared, "coverage"))


def test_coverage_of_nothing_and_of_everything_is_raster():
    for graph in (torch.zeros(2, 5, 5), torch.ones(2, 5, 5)):
        assert descending(rank_graph(graph, "coverage")) == [[0, 1, 2, 3, 4]] * 2


def test_coverage_long_products_do_not_underflow():
    # products of 300 factors of .6 are below the smallest float32, yet the tail must follow the graph
    graph = 0.4 + 0.001 * random_graph(1, 400)
    assert torch.equal(rank_graph(graph.float(), "coverage").argmin(), rank_graph(graph, "coverage").argmin())
    assert descending(rank_graph(graph.float(), "coverage"))[0][-50:] != sorted(
        descending(rank_graph(graph.float(), "coverage"))[0][-50:]
    )


@pytest.mark.parametrize("ranking", RANKINGS)
def test_permuted_patches_get_permuted_scores(ranking):
    graph = random_graph()
    permutation = torch.randperm(14, generator=torch.Generator().manual_seed(1))
    permuted = rank_graph(graph[:, permutation][:, :, permutation], ranking)
    torch.testing.assert_close(permuted, rank_graph(graph, ranking)[:, permutation])


@pytest.mark.parametrize("ranking", RANKINGS)
def test_one_graph_is_a_batch_of_one(ranking):
    graph = random_graph(1)
    assert torch.equal(rank_graph(graph[0], ranking), rank_graph(graph, ranking)[0])
    assert torch.equal(graph, random_graph(1))  # and left as it was
    assert rank_graph(graph.half(), ranking).dtype == torch.float32


def test_the_other_rankings():
    graph = random_graph()
    torch.testing.assert_close(rank_graph(graph), pagerank(graph))
    torch.testing.assert_close(rank_graph(graph, "pagerank", 0.5), pagerank(graph, 0.5))
    torch.testing.assert_close(rank_graph(graph, "transposed", 0.5), pagerank(graph.transpose(1, 2), 0.5))
    column = [[sum(one[i][j] for i in range(14)) for j in range(14)] for one in graph.tolist()]
    torch.testing.assert_close(rank_graph(graph, "in_degree"), torch.tensor(column, dtype=torch.float64))


def test_influence_ranks_high_and_transposed_low():
    graph = torch.zeros(1, 4, 4)
    graph[0, :, 2] = 0.5  # all depend on patch 2
    for ranking in ("pagerank", "coverage", "in_degree"):
        assert rank_graph(graph, ranking).argmax() == 2
    graph[0, 2, 2] = 0
    assert rank_graph(graph, "transposed").argmin() == 2


def test_errors_name_what_was_given():
    with pytest.raises(CollapseError, match="pagerank, coverage, in_degree, transposed, got 'degree'"):
        rank_graph(random_graph(), "degree")
    with pytest.raises(CollapseError, match=r"A must be in \[0, 1\], got values in \[0, 1.5\]"):
        rank_graph(torch.tensor([[0.0, 1.5], [0.0, 0.0]]), "coverage")
    for ranking in RANKINGS:
        with pytest.raises(CollapseError, match="A must be non-negative"):
            rank_graph(-random_graph(), ranking)
        with pytest.raises(CollapseError, match="A must be square"):
            rank_graph(torch.rand(2, 3, 4), ranking)
    with pytest.raises(CollapseError, match="damping"):
        rank_graph(random_graph(), damping=1.0)


@pytest.mark.parametrize("ranking", ["pagerank", "transposed", "in_degree"])
@pytest.mark.parametrize("scale", [1e-38, 1e38, 3e38])
def test_the_scale_of_a_graph_does_not_change_the_order(ranking, scale):
    graph = torch.rand(2, 7, 7, generator=torch.Generator().manual_seed(0))
    scores = rank_graph(graph * scale, ranking)
    assert scores.isfinite().all() and torch.equal(scores.argsort(), rank_graph(graph, ranking).argsort())
