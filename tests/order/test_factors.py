import math

import pytest
import torch

from timm_collapse.order import (
    CollapseError,
    condition,
    expected_errors,
    neighbour_kernel,
    parallel_picks,
    single_errors,
)


def parallel_order(*args, **kwargs):
    """Where all patches are candidates."""
    return parallel_picks(*args, **kwargs)[0]


@pytest.fixture
def model():
    generator = torch.Generator().manual_seed(3)
    g = torch.randn(3, 12, 4, generator=generator, dtype=torch.float32)
    return g, torch.rand(3, 12, generator=generator) + 0.1


def conditional_variance(g, d, shown):
    """Slow reference: Schur complement of the whole covariance matrix, in float64."""
    covariance = (g.double() @ g.double().T) + torch.diag(d.double())
    s = torch.tensor(sorted(shown), dtype=torch.long)
    if not len(s):
        return covariance
    cross = covariance[:, s]
    return covariance - cross @ torch.linalg.inv(covariance[s][:, s]) @ cross.T


def test_expected_errors_equal_the_schur_complement(model):
    g, d = model
    revealed = torch.rand(3, 5, 12, generator=torch.Generator().manual_seed(0)) < 0.4
    revealed[:, 0] = False
    errors = expected_errors(g, d, revealed)
    for b in range(3):
        for c in range(5):
            shown = revealed[b, c].nonzero().flatten().tolist()
            expected = conditional_variance(g[b], d[b], shown).diagonal().clamp_min(0).sqrt()
            expected[shown] = 0
            assert torch.allclose(errors[b, c].double(), expected, atol=1e-4)


def test_expected_errors_pass_gradcheck_and_survive_autocast(model):
    g, d = model
    revealed = torch.zeros(3, 1, 12, dtype=torch.bool)
    revealed[:, :, :3] = True
    with torch.autocast("cpu", torch.bfloat16):
        mixed = expected_errors(g, d, revealed)
    assert torch.allclose(mixed, expected_errors(g, d, revealed))
    leaf = g.clone().requires_grad_()
    expected_errors(leaf, d, revealed).sum().backward()
    step = torch.zeros_like(g)
    step[1, 5, 2] = 1e-3
    numeric = (expected_errors(g + step, d, revealed).sum() - expected_errors(g - step, d, revealed).sum()) / 2e-3
    assert torch.isclose(leaf.grad[1, 5, 2], numeric, rtol=2e-2, atol=1e-3)


def greedy(covariance, count, shown=()):
    """Slow reference: one patch after the other, each the one that removes most, after conditioning on those before."""
    chosen = []
    for _ in range(count):
        c = conditioned(covariance, [*shown, *chosen])
        gains = first_order_gains(c, [*shown, *chosen])
        chosen.append(int(gains.argmax()))
    return chosen


def conditioned(covariance, s):
    s = torch.tensor(s, dtype=torch.long)
    cross = covariance[:, s]
    return covariance - cross @ torch.linalg.inv(covariance[s][:, s]) @ cross.T if len(s) else covariance


def first_order_gains(c, shown, weights=None):
    """Each patch's own deviation and what it tells of the other hidden ones, -1 for shown ones."""
    weights, variance, shown = 1.0 if weights is None else weights, c.diagonal(), list(shown)
    told = weights * c.square() / (2 * variance.sqrt() * variance.unsqueeze(1))  # [j, n]: of n by j
    told.fill_diagonal_(0.0)
    told[:, shown] = 0.0
    gains = weights * variance.sqrt() + told.sum(1)
    gains[shown] = -1.0
    return gains


def covariance(g, d):
    return g.double() @ g.double().T + torch.diag(d.double())


def test_single_errors_equal_conditioning_on_one_patch(model):
    g, d = model
    errors = single_errors(g, d)
    assert errors.shape == (3, 13, 12)
    for b in range(3):
        c = covariance(g[b], d[b])
        assert torch.allclose(errors[b, 0].double(), c.diagonal().sqrt())
        for j in range(12):
            left = conditioned(c, [j]).diagonal().clamp_min(0).sqrt()
            left[j] = c[j, j].sqrt()
            assert torch.allclose(errors[b, 1 + j].double(), left, atol=1e-4)


@pytest.mark.parametrize("weights", [None, torch.rand(3, 12, generator=torch.Generator().manual_seed(4)) ** 2])
def test_parallel_order_equals_a_slow_one_patch_after_the_other(model, weights):
    g, d = model
    shown = [2, 7]
    revealed = torch.zeros(3, 12, dtype=torch.bool)
    revealed[:, shown] = True
    orders = [parallel_order(g, d, revealed, rounds, weights) for rounds in (1, 2, 3)]
    for b in range(3):
        c = covariance(g[b], d[b])
        gains = first_order_gains(c, shown, None if weights is None else weights[b].double())
        hidden = [j for j in range(12) if j not in shown]
        rho2 = (c - torch.diag(d[b].double())).square() / (c.diagonal() * c.diagonal().unsqueeze(1))
        scores = {j: float(gains[j]) for j in hidden}
        for order in orders:
            shares = {}
            for j in sorted(hidden, key=scores.get, reverse=True):
                shares[j] = 1 - sum(shares[i] * rho2[j, i] for i in shares)
            assert order[b, :10].tolist() == sorted(
                hidden, key=lambda j: float(gains[j]) * max(float(shares[j]), 1e-4), reverse=True
            )
            assert sorted(order[b, 10:].tolist()) == shown
            scores = {j: float(gains[j] * shares[j]) for j in hidden}


def test_nothing_revealed_is_the_same_as_none(model):
    g, d = model
    assert torch.equal(parallel_order(g, d), parallel_order(g, d, torch.zeros(3, 12, dtype=torch.bool)))


def test_patches_that_share_nothing_come_by_their_deviation():
    g, variances = torch.zeros(1, 5, 2), torch.tensor([[0.3, 0.9, 0.1, 0.5, 0.7]])
    assert parallel_order(g, variances).tolist() == [[1, 4, 3, 0, 2]]
    weights = torch.tensor([[2.0, 1.0, 9.0, 1.0, 0.0]])
    by_weight = (weights * variances.sqrt()).argsort(descending=True)
    assert parallel_order(g, variances, weights=weights).tolist() == by_weight.tolist() == [[2, 0, 1, 3, 4]]


def test_equal_weights_change_nothing_and_what_no_weight_asks_for_comes_last(model):
    g, d = model
    assert torch.equal(parallel_order(g, d, weights=torch.ones(3, 12)), parallel_order(g, d))
    g = torch.cat([g, torch.zeros(3, 12, 4)], 2)
    g[:, 6:] = g[:, 6:].roll(4, 2)  # the two halves share no factor
    weights = torch.ones(3, 12).index_fill(1, torch.arange(6), 0.0)
    assert (parallel_order(g, d, weights=weights)[:, :6] >= 6).all()
    told = torch.tensor([[[1.0], [1.0], [0.0]]])  # the first patch counts for what it tells about the second alone
    for last, expected in ((1.0, [[1, 2, 0]]), (0.01, [[1, 0, 2]])):
        weights = torch.tensor([[0.0, 1.0, last]])
        assert parallel_order(told, torch.full((1, 3), 0.1), weights=weights).tolist() == expected


def test_redundant_twin_comes_late():
    """Two patches with the same content and one with another: after a twin, the other one is worth more."""
    g = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 0.9], [0.9, 0.0], [0.0, 0.5]]])
    order = parallel_order(g, torch.full((1, 5), 1e-3))
    assert order[0, 0].item() in (0, 1) and order[0, 1].item() == 2


def test_kernel_by_its_formula():
    kernel = neighbour_kernel((2, 3), 0.3)
    for i in range(6):
        for j in range(6):
            squared = (i // 3 - j // 3) ** 2 + (i % 3 - j % 3) ** 2
            assert kernel[i, j].item() == pytest.approx(0.3 * math.exp(-squared / 2) if squared else 1.0)
    assert torch.equal(neighbour_kernel((2, 3), 0.0), torch.eye(6))
    for wrong in (1.0, -0.1):
        with pytest.raises(CollapseError, match=r"strength must be in \[0, 1\), got"):
            neighbour_kernel((2, 3), wrong)


def test_neighbours_share_what_the_kernel_says(model):
    """Slow reference on one image: 1 - (1 - rho^2)(1 - k) is shared, in gains and in shares."""
    g, d = model
    kernel = neighbour_kernel((3, 4), 0.5).double()
    for b in range(3):
        c = covariance(g[b], d[b])
        rho2 = (c - torch.diag(d[b].double())).square() / (c.diagonal() * c.diagonal().unsqueeze(1))
        shared = 1 - (1 - rho2) * (1 - kernel)
        s = c.diagonal().sqrt()
        gains = [s[j] + sum(s[n] * shared[j, n] / 2 for n in range(12) if n != j) for j in range(12)]
        shares = {}
        for j in sorted(range(12), key=lambda j: gains[j], reverse=True):
            shares[j] = 1 - sum(shares[i] * shared[j, i] for i in shares)
        expected = sorted(range(12), key=lambda j: float(gains[j] * shares[j]), reverse=True)
        assert parallel_order(g[b : b + 1], d[b : b + 1], None, 1, None, kernel)[0].tolist() == expected
    assert torch.equal(parallel_order(g, d, kernel=torch.eye(12)), parallel_order(g, d))


def test_candidates_are_ordered_among_themselves_and_the_others_by_their_gain(model):
    g, d = model
    revealed = torch.zeros(3, 12, dtype=torch.bool).index_fill(1, torch.tensor([2, 7]), True)
    ahead, others = parallel_picks(g, d, revealed, candidates=5)
    for b in range(3):
        gains = first_order_gains(covariance(g[b], d[b]), [2, 7])
        by_gain = gains.argsort(descending=True, stable=True).tolist()
        assert sorted(ahead[b].tolist()) == sorted(by_gain[:5]) and others[b].tolist() == by_gain[5:]
        rho2 = (covariance(g[b], d[b]) - torch.diag(d[b].double())).square()
        rho2 /= covariance(g[b], d[b]).diagonal() * covariance(g[b], d[b]).diagonal().unsqueeze(1)
        scores = dict(enumerate(gains.tolist()))
        for _ in range(3):
            shares = {}
            for j in sorted(by_gain[:5], key=scores.get, reverse=True):
                shares[j] = 1 - sum(shares[i] * rho2[j, i] for i in shares)
            scores = {j: float(gains[j] * shares[j]) for j in shares}
        assert ahead[b].tolist() == sorted(scores, key=scores.get, reverse=True)
    assert torch.equal(parallel_picks(g, d, revealed, candidates=10)[0], parallel_order(g, d, revealed)[:, :10])


def test_it_leaves_hardly_more_than_greedy_choice():
    """Eight picks at once among 64 patches in clusters; without damping they would fall into few of the clusters."""
    generator = torch.Generator().manual_seed(1)
    centres = torch.randn(20, 8, 8, generator=generator)
    g = centres.repeat_interleave(8, 1) + 0.2 * torch.randn(20, 64, 8, generator=generator)
    g, d = g * torch.rand(20, 64, 1, generator=generator), torch.full((20, 64), 0.05)

    def left(picks):
        return expected_errors(g, d, torch.zeros(20, 64).scatter(1, picks, 1.0).bool().unsqueeze(1)).mean().item()

    slow = left(torch.tensor([greedy(covariance(g[b], d[b]), 8) for b in range(20)]))
    undamped = torch.stack([first_order_gains(covariance(g[b], d[b]), []).topk(8).indices for b in range(20)])
    parallel = left(parallel_order(g, d)[:, :8])
    assert parallel < slow + 0.2 * (left(undamped) - slow)


def test_it_runs_under_autocast_as_without(model):
    g, d = model
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(parallel_order(g, d), parallel_order(g.float(), d))


def test_onnx_export_solves_without_linear_algebra(monkeypatch):
    loadings, noise = torch.randn(2, 20, 6), torch.rand(2, 20) + 0.1
    revealed = torch.rand(2, 3, 20) < torch.tensor([0.0, 0.3, 0.8]).view(1, 3, 1)

    def results():
        g = condition(loadings, noise, revealed)
        return g @ g.mT, expected_errors(loadings, noise, revealed), parallel_order(loadings, noise, revealed[:, 1])

    expected = results()
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    monkeypatch.setattr(torch.linalg, "cholesky_ex", None)
    monkeypatch.setattr(torch.linalg, "solve_triangular", None)
    covariance, errors, order = results()
    assert torch.allclose(covariance, expected[0], atol=1e-5) and torch.allclose(errors, expected[1], atol=1e-5)
    for found, wanted, shown in zip(order, expected[2], revealed[:, 1]):  # the order of the revealed means nothing
        hidden = int((~shown).sum())
        assert torch.equal(found[:hidden], wanted[:hidden])
