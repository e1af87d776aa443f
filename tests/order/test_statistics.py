"""Rank statistics against scipy and against their definitions."""

import pytest
import torch
from scipy import stats

from timm_collapse.order import CollapseError, Order, image_dependence, spearman


def random_order(images=5, grid=(7, 5), seed=0, shared=0.0):
    """Orders with a map in common."""
    generator = torch.Generator().manual_seed(seed)
    size = grid[0] * grid[1]
    common = torch.randn(size, generator=generator)
    return Order(shared * common + torch.randn(images, size, generator=generator), grid)


@pytest.mark.parametrize("grid", [(1, 2), (1, 3), (7, 5), (8, 8), (14, 14)])
@pytest.mark.parametrize("shared", [0.0, 2.0])
def test_against_scipy(grid, shared):
    a, b = random_order(10, grid, shared=shared).reversed(), random_order(10, grid, shared=shared)
    b = Order(b.scores + torch.linspace(-3, 3, 10)[:, None] * a.scores, grid)  # from disagreement to agreement
    expected = [stats.spearmanr(x, y).statistic for x, y in zip(a.ranks.numpy(), b.ranks.numpy(), strict=True)]
    torch.testing.assert_close(spearman(a, b).double(), torch.tensor(expected, dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(spearman(b, a), spearman(a, b))


def test_extremes_and_one_order_against_many():
    order = random_order()
    torch.testing.assert_close(spearman(order, order), torch.ones(5))
    torch.testing.assert_close(spearman(order, order.reversed()), -torch.ones(5))
    each = torch.cat([spearman(order[i], order[2]) for i in range(5)])
    assert torch.equal(spearman(order, order[2]), each) and torch.equal(spearman(order[2], order), each)


@pytest.mark.parametrize("shared", [0.0, 0.7, 3.0])
@pytest.mark.parametrize("images", [2, 3, 8])
def test_image_dependence_against_its_definition(images, shared):
    order = random_order(images, shared=shared)
    result = image_dependence(order)
    pairs = [spearman(order[i], order[j]).item() for i in range(images) for j in range(images) if i != j]
    assert result.pairwise_spearman == pytest.approx(sum(pairs) / len(pairs), abs=1e-6)

    ranks, residual, total = order.ranks.double(), 0.0, 0.0
    for i in range(images):
        others = torch.cat([ranks[:i], ranks[i + 1 :]]).mean(dim=0)
        residual += (ranks[i] - others).square().sum().item()
        total += (ranks[i] - ranks[i].mean()).square().sum().item()
    assert result.prior_share == pytest.approx(1 - residual / total, abs=1e-6)


def test_image_dependence_extremes():
    one = random_order(1)
    assert image_dependence(one[torch.zeros(6, dtype=torch.long)]) == pytest.approx((1.0, 1.0))
    unrelated = image_dependence(random_order(400, (14, 14)))
    assert max(map(abs, unrelated)) < 0.005
    assert image_dependence(Order.cat([one, one.reversed()])).pairwise_spearman == pytest.approx(-1)


def test_errors_name_what_was_given():
    order = random_order()
    with pytest.raises(CollapseError, match=r"\(7, 5\) and \(5, 7\)"):
        spearman(order, random_order(grid=(5, 7)))
    with pytest.raises(CollapseError, match="got 5 and 3"):
        spearman(order, order[:3])
    with pytest.raises(CollapseError, match="at least two patches"):
        spearman(random_order(grid=(1, 1)), random_order(grid=(1, 1)))
    with pytest.raises(CollapseError, match="two images.*Order\\(1 images, 7x5 patches, cpu\\)"):
        image_dependence(order[0])
    with pytest.raises(CollapseError, match="two patches"):
        image_dependence(random_order(grid=(1, 1)))
