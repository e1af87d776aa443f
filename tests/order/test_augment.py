import math

import pytest
import torch

from timm_collapse import CollapseError, Order
from timm_collapse.order import jitter_order, mix_random, spearman


def order_of(batch: int, grid=(8, 8)) -> Order:
    return Order(torch.randn(batch, grid[0] * grid[1]), grid)


def test_no_jitter_keeps_the_order():
    order = order_of(3)
    assert jitter_order(order, 0.0, torch.rand(3, 64)) is order
    tiny = jitter_order(order, 1e-4, torch.rand(3, 64))
    assert torch.equal(tiny.indices, order.indices)


def test_jitter_moves_more_with_temperature_down_to_random():
    order = order_of(200)
    agree = [spearman(jitter_order(order, t, torch.rand(200, 64)), order).mean().item() for t in (0.05, 0.2, 1.0, 1e3)]
    assert agree == sorted(agree, reverse=True) and agree[0] > 0.95 and abs(agree[-1]) < 0.03


def test_first_place_has_plackett_luce_probabilities():
    draws, temperature = 40_000, 0.5
    order = Order.from_ranks(torch.arange(4).repeat(draws, 1), (2, 2))
    first = jitter_order(order, temperature, torch.rand(draws, 4)).indices[:, 0]
    weight = torch.tensor([math.exp(-rank / (temperature * 4)) for rank in range(4)])
    expected = weight / weight.sum()
    found = first.bincount(minlength=4) / draws
    assert (found - expected).abs().max() < 4 * (0.25 / draws) ** 0.5  # four standard errors


def test_mix_random_replaces_the_chosen_share_only():
    order = order_of(1000)
    uniform = torch.rand(1000, 65)
    mixed = mix_random(order, 0.3, uniform)
    same = (mixed.indices == order.indices).all(1)
    assert torch.equal(same, uniform[:, -1] >= 0.3)
    replaced = ~same
    assert torch.equal(mixed.indices[replaced], uniform[replaced, :-1].argsort(1, descending=True))
    assert mix_random(order, 0.0, uniform) is order
    assert abs(spearman(mix_random(order, 1.0, uniform), order).mean()) < 0.03


def test_bad_input():
    order = order_of(2)
    for function, value in ((jitter_order, -0.1), (jitter_order, float("nan")), (mix_random, 1.1), (mix_random, -1)):
        with pytest.raises(CollapseError, match="must be"):
            function(order, value, torch.rand(2, 65 if function is mix_random else 64))
    with pytest.raises(CollapseError, match=r"uniform must have shape \(2, 64\), got .*\(2, 65\)"):
        jitter_order(order, 0.1, torch.rand(2, 65))
    with pytest.raises(CollapseError, match=r"uniform must have shape \(2, 65\), got .*\(2, 64\)"):
        mix_random(order, 0.1, torch.rand(2, 64))
