import pytest
import torch

from timm_collapse.order import expected_errors, greedy_factor_order
from timm_collapse.order.factors import condition


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


def test_greedy_equals_a_slow_greedy_on_the_whole_covariance(model):
    g, d = model
    picks, _ = greedy_factor_order(g, d, torch.zeros(3, 12, dtype=torch.bool), 12)
    for b in range(3):
        chosen = []
        for _ in range(12):
            c = conditional_variance(g[b], d[b], chosen)
            gains = torch.full((12,), -1.0, dtype=torch.float64)
            for j in set(range(12)) - set(chosen):
                others = [n for n in range(12) if n not in chosen and n != j]
                gains[j] = c[j, j].sqrt() + sum(c[n, j] ** 2 / (2 * c[n, n].sqrt() * c[j, j]) for n in others)
            chosen.append(int(gains.argmax()))
        assert picks[b].tolist() == chosen


def test_redundant_twin_comes_late():
    """Two patches with the same content and one with another: after a twin, the other one is worth more."""
    g = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 0.9], [0.9, 0.0], [0.0, 0.5]]])
    picks, _ = greedy_factor_order(g, torch.full((1, 5), 1e-3), torch.zeros(1, 5, dtype=torch.bool), 2)
    assert picks[0, 0].item() in (0, 1) and picks[0, 1].item() == 2


def test_visible_patches_are_not_picked_again(model):
    g, d = model
    revealed = torch.zeros(3, 12, dtype=torch.bool)
    revealed[:, [2, 7]] = True
    picks, gains = greedy_factor_order(g, d, revealed, 5)
    first, _ = greedy_factor_order(g, d, torch.zeros_like(revealed), 4)
    later, _ = greedy_factor_order(g, d, torch.zeros_like(revealed).scatter(1, first, True), 3)
    whole, _ = greedy_factor_order(g, d, torch.zeros_like(revealed), 7)
    assert torch.equal(torch.cat([first, later], 1), whole)  # what is visible is conditioned on
    assert not set(picks.flatten().tolist()) & {2, 7}
    assert all(len(set(row)) == 5 for row in picks.tolist())
    assert (gains < 0).sum(1).tolist() == [7, 7, 7]


def test_onnx_export_conditions_without_cholesky(monkeypatch):
    loadings, noise = torch.randn(2, 20, 6), torch.rand(2, 20) + 0.1
    revealed = torch.rand(2, 3, 20) < torch.tensor([0.0, 0.3, 0.8]).view(1, 3, 1)

    def results():
        g = condition(loadings, noise, revealed)
        return (
            g @ g.mT,
            expected_errors(loadings, noise, revealed),
            *greedy_factor_order(loadings, noise, revealed[:, 1], 4),
        )

    expected = results()
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    monkeypatch.setattr(torch.linalg, "cholesky", None)
    covariance, errors, picks, gains = results()
    assert torch.allclose(covariance, expected[0], atol=1e-5) and torch.allclose(errors, expected[1], atol=1e-5)
    assert torch.equal(picks, expected[2]) and torch.allclose(gains, expected[3], atol=1e-4)
