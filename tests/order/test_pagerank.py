"""pagerank: closed forms, networkx, invariances, gradients, and what it refuses."""

import networkx
import pytest
import torch

from timm_collapse.order import CollapseError, pagerank


def random_graph(batch=3, patches=12, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    graph = torch.rand(batch, patches, patches, generator=generator, dtype=dtype)
    return graph * (torch.rand(batch, patches, patches, generator=generator) < 0.4)


def with_networkx(graph, damping, personalization=None):
    directed = networkx.from_numpy_array(graph.numpy(), create_using=networkx.DiGraph)
    jump = None if personalization is None else dict(enumerate(personalization.tolist()))
    ranks = networkx.pagerank(directed, alpha=damping, personalization=jump, tol=1e-13, max_iter=5000)
    return torch.tensor([ranks[n] for n in range(len(graph))], dtype=torch.float64)


@pytest.mark.parametrize("damping", [0.0, 0.3, 0.85])
def test_two_patches_by_hand(damping):
    # 0 depends on 1, and 1 on nothing: r0 = (1-c)/2 + c r1/2 and r0 + r1 = 1
    ranks = pagerank(torch.tensor([[0.0, 3.0], [0.0, 0.0]]), damping)
    expected = 1 / (2 + damping)
    torch.testing.assert_close(ranks, torch.tensor([expected, 1 - expected]))
    assert ranks[1] >= ranks[0]


def test_star_by_hand():
    # 4 leaves depend on the centre, the centre on all leaves alike: r = (1-c)/5 + c (sum of leaves) for the centre
    graph, c = torch.zeros(5, 5), 0.85
    graph[1:, 0], graph[0, 1:] = 1, 0.2
    centre = ((1 - c) / 5 + c) / (1 + c)
    torch.testing.assert_close(pagerank(graph), torch.tensor([centre] + [(1 - centre) / 4] * 4))


def test_the_influential_patch_is_first_not_its_dependents():
    graph = torch.zeros(1, 4, 4)
    graph[0, :, 2] = 1  # A[i, 2]: all depend on patch 2
    assert pagerank(graph).argmax() == 2


@pytest.mark.parametrize("damping", [0.0, 0.5, 0.85, 0.99])
@pytest.mark.parametrize("personalized", [False, True])
def test_networkx_with_dangling_rows(damping, personalized):
    graph = random_graph()
    graph[0, 3] = 0
    graph[1, :5] = 0
    jump = torch.rand(12, dtype=torch.float64, generator=torch.Generator().manual_seed(5)) if personalized else None
    if personalized:
        jump[:2] = 0
    expected = torch.stack([with_networkx(one, damping, jump) for one in graph])
    torch.testing.assert_close(pagerank(graph, damping, jump), expected, atol=1e-6, rtol=0)


def test_personalization_of_each_graph_and_its_scale():
    graph = random_graph()
    graph[:, 4] = 0
    jump = torch.rand(3, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    expected = torch.stack([with_networkx(one, 0.85, row) for one, row in zip(graph, jump, strict=True)])
    torch.testing.assert_close(pagerank(graph, personalization=jump), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(pagerank(graph, personalization=7 * jump), pagerank(graph, personalization=jump))


def test_no_graph_and_no_damping_leave_the_jumps():
    jump = torch.tensor([0.0, 1.0, 3.0])
    torch.testing.assert_close(pagerank(torch.zeros(3, 3), personalization=jump), jump / 4)
    torch.testing.assert_close(pagerank(torch.rand(3, 3), damping=0, personalization=jump), jump / 4)
    torch.testing.assert_close(pagerank(torch.ones(1, 1)), torch.ones(1))


def test_permutation_and_scale():
    graph = random_graph()
    permutation = torch.randperm(12, generator=torch.Generator().manual_seed(7))
    ranks = pagerank(graph)
    torch.testing.assert_close(pagerank(graph[:, permutation][:, :, permutation]), ranks[:, permutation])
    factors = torch.logspace(-6, 6, 12, dtype=torch.float64)[:, None]
    torch.testing.assert_close(pagerank(graph * factors), ranks)  # each row by its own factor


def test_a_batch_is_its_graphs():
    graph = random_graph()
    torch.testing.assert_close(pagerank(graph), torch.stack([pagerank(one) for one in graph]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    graph = random_graph().to(dtype)
    ranks = pagerank(graph)
    assert ranks.dtype == torch.float32
    torch.testing.assert_close(ranks, pagerank(graph.double()).float(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("damping", [0.85, 0.9999])
def test_rows_sum_to_one_at_full_size(damping):
    ranks = pagerank(random_graph(2, 1024, dtype=torch.float32), damping)
    assert ranks.shape == (2, 1024) and (ranks > 0).all()
    torch.testing.assert_close(ranks.sum(dim=1), torch.ones(2))


def test_gradients():
    graph = (random_graph(2, 5) + 0.1).requires_grad_()
    jump = (random_graph(1, 5, seed=1)[0, :2] + 0.1).requires_grad_()
    assert torch.autograd.gradcheck(lambda A, b: pagerank(A, 0.85, b), (graph, jump))


def test_gradients_are_finite_beside_dangling_rows():
    graph = random_graph()
    graph[:, 2] = 0
    graph.requires_grad_()
    pagerank(graph).square().sum().backward()
    assert graph.grad.isfinite().all() and (graph.grad != 0).any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"A": torch.rand(2, 3, 4)}, r"A .*square.*\(2, 3, 4\)"),
        ({"A": torch.rand(3)}, r"A .*\(3,\)"),
        ({"A": torch.rand(0, 0)}, r"A .*\(0, 0\)"),
        ({"A": torch.ones(3, 3, dtype=torch.long)}, "A .*floating point.*int64"),
        ({"A": torch.tensor([[0.0, 1.0], [-0.5, 0.0]])}, r"A .*non-negative.*-0.5, 1"),
        ({"A": torch.tensor([[0.0, float("nan")], [1.0, 0.0]])}, "A .*finite.*nan"),
        ({"A": torch.tensor([[0.0, float("inf")], [1.0, 0.0]])}, "A .*finite.*inf"),
        ({"damping": 1.0}, r"damping .*\[0, 1\).*got 1.0"),
        ({"damping": -0.1}, "damping .*got -0.1"),
        ({"damping": float("nan")}, "damping .*got nan"),
        ({"personalization": torch.rand(3)}, r"personalization .*\(2,\) or \(1, 2\).*\(3,\)"),
        ({"personalization": [1.0, 1.0]}, "personalization .*list"),
        ({"personalization": torch.tensor([1.0, -1.0])}, r"personalization .*non-negative.*-1, 1"),
        ({"personalization": torch.tensor([1.0, float("nan")])}, "personalization .*finite"),
        ({"personalization": torch.zeros(2)}, "personalization .*all zero"),
        ({"personalization": torch.zeros(1, 2)}, "personalization .*all zero"),
    ],
)
def test_errors_name_what_was_given(arguments, message):
    with pytest.raises(CollapseError, match=message):
        pagerank(**{"A": torch.ones(1, 2, 2), **arguments})


@pytest.mark.parametrize("scale", [1e-45, 1e-38, 1.0, 1e30, 1e38, 3e38])
def test_the_scale_of_rows_has_no_effect_up_to_the_ends_of_float32(scale):
    star, c = torch.zeros(5, 5), 0.85  # as by hand above
    star[1:, 0], star[0, 1:] = 1, 1
    centre = ((1 - c) / 5 + c) / (1 + c)
    expected = torch.tensor([centre] + [(1 - centre) / 4] * 4)
    one, whole = star.clone(), star * scale
    one[0] *= scale
    for graph in (one, whole, torch.stack([one, whole])):
        torch.testing.assert_close(pagerank(graph), expected.expand(graph.shape[:-1]), atol=1e-6, rtol=1e-5)
    ones = torch.ones(300, 300) * scale  # row sums beyond float32 from 1e36
    torch.testing.assert_close(pagerank(ones), torch.full((300,), 1 / 300))
    jump = torch.tensor([1.0, 1.0, 0, 0, 0]) * scale
    torch.testing.assert_close(pagerank(star, personalization=jump), pagerank(star, personalization=jump / scale))
    graph = (star * scale).requires_grad_()
    (gradient,) = torch.autograd.grad(pagerank(graph)[0], graph)
    if 1e-30 < scale:  # of smaller ones the gradient itself is beyond float32
        unit = star.clone().requires_grad_()
        torch.testing.assert_close(
            gradient * scale, torch.autograd.grad(pagerank(unit)[0], unit)[0], atol=1e-5, rtol=1e-4
        )


def test_a_personalization_beyond_float32_is_normalised_first():
    graph = random_graph(dtype=torch.float32)
    jump = torch.arange(12, dtype=torch.float64)
    torch.testing.assert_close(pagerank(graph, personalization=jump * 1e300), pagerank(graph, personalization=jump))
