import pytest
import torch

from timm_collapse.order import condition, expected_errors, parallel_order, single_errors


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


def first_order_gains(c, shown):
    gains = torch.full((len(c),), -1.0, dtype=torch.float64)
    for j in set(range(len(c))) - set(shown):
        others = [n for n in range(len(c)) if n not in shown and n != j]
        gains[j] = c[j, j].sqrt() + sum(c[n, j] ** 2 / (2 * c[n, n].sqrt() * c[j, j]) for n in others)
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


def test_parallel_order_equals_a_slow_one_patch_after_the_other(model):
    g, d = model
    shown = [2, 7]
    revealed = torch.zeros(3, 12, dtype=torch.bool)
    revealed[:, shown] = True
    orders = [parallel_order(g, d, revealed, rounds) for rounds in (1, 2, 3)]
    for b in range(3):
        c = covariance(g[b], d[b])
        gains = first_order_gains(c, shown)
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
    g = torch.zeros(1, 5, 2)
    assert parallel_order(g, torch.tensor([[0.3, 0.9, 0.1, 0.5, 0.7]])).tolist() == [[1, 4, 3, 0, 2]]


def test_redundant_twin_comes_late():
    """Two patches with the same content and one with another: after a twin, the other one is worth more."""
    g = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 0.9], [0.9, 0.0], [0.0, 0.5]]])
    order = parallel_order(g, torch.full((1, 5), 1e-3))
    assert order[0, 0].item() in (0, 1) and order[0, 1].item() == 2


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
