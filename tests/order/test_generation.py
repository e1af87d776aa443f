"""Generation orders: MAR's plan of tokens per step, and the order that each sample gets."""

import math

import numpy as np
import pytest
import torch

from timm_collapse import ClassOrderBank, CollapseError, GenerationOrder, Order
from timm_collapse.order import GENERATION_ORDERS, baseline_scores, tokens_per_step

GRID = (4, 6)
STATIC = ("random", "raster", "centre", "halton", "bayer")


@pytest.fixture
def bank():
    """Three classes; those of class c begin at patch 8 c."""
    ranks = torch.stack([(torch.arange(24) - 8 * label) % 24 for label in range(3)])
    return ClassOrderBank.build([(Order.from_ranks(ranks, GRID), torch.arange(3))], 3)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def slow_plan(length, steps):
    """The masked tokens of the reference's loop, one by one."""
    masked, plan = np.ones(length, bool), []
    for step in range(steps):
        ratio = np.cos(math.pi / 2.0 * (step + 1) / steps)
        next_length = max(1.0, min(masked.sum() - 1, np.floor(length * ratio)))
        before = masked.copy()
        masked[int(next_length) if step < steps - 1 else 0 :] = False
        plan.append(int((before & ~masked).sum()))
    return plan


@pytest.mark.parametrize("length", [1, 2, 3, 16, 49, 64, 100, 256])
def test_plan_is_the_references_loop_and_has_no_empty_step(length):
    for steps in sorted({1, 2, 3, 7, 8, 16, 49, 64, 100, length // 2, length - 1, length, 255, 256}):
        if 1 <= steps <= length:
            plan = tokens_per_step(length, steps)
            assert plan == slow_plan(length, steps)
            assert sum(plan) == length and len(plan) == steps and min(plan) >= 1


def test_plans_by_hand():
    assert tokens_per_step(64, 1) == [64]
    assert tokens_per_step(64, 64) == [1] * 64
    assert tokens_per_step(100, 2) == [30, 70]  # 100 cos(pi/4) = 70.7
    assert tokens_per_step(10, 3) == [2, 3, 5]  # 8.66 and 5.0000000000000009
    assert tokens_per_step(np.int64(4), np.int64(4)) == [1, 1, 1, 1]
    assert GenerationOrder("raster", (8, 8)).plan(8) == tokens_per_step(64, 8)


@pytest.mark.parametrize("steps", [0, -1, 65, 2.0, True, "8", None])
def test_wrong_steps(steps):
    with pytest.raises(CollapseError, match=r"steps must be an int in \[1, 64\].*got") as error:
        tokens_per_step(64, steps)
    assert repr(steps) in str(error.value)


@pytest.mark.parametrize("length", [0, 4.0, False])
def test_wrong_num_tokens(length):
    with pytest.raises(CollapseError, match="num_tokens must be an int of at least 1, got"):
        tokens_per_step(length, 1)


@pytest.mark.parametrize("name", [name for name in GENERATION_ORDERS if name != "confidence"])
def test_every_name_gives_permutations_that_the_seed_decides(name, bank):
    labels = torch.tensor([2, 0, 1, 2, 2])
    order = GenerationOrder(name, GRID, bank, temperature=0.2, random_share=0.3)
    assert order.name == name and not order.dynamic
    first, same, other = order(labels, generator()), order(labels, generator()), order(labels, generator(1))
    assert first.grid == GRID and len(first) == 5
    assert torch.equal(first.indices.sort(1).values, torch.arange(24).expand(5, -1))
    assert torch.equal(first.indices, same.indices) and not torch.equal(first.indices, other.indices)
    state = torch.get_rng_state()
    order(labels, generator())
    assert torch.equal(state, torch.get_rng_state())  # no other randomness than the generator's


@pytest.mark.parametrize("name", STATIC[1:])
def test_fixed_orders_are_the_baselines_and_draw_nothing(name):
    g = generator()
    state = g.get_state()
    order = GenerationOrder(name, GRID)(torch.tensor([7, 70_000]), g)
    expected = Order(baseline_scores(name, torch.zeros(2, 3, 8, 8), GRID), GRID)
    assert torch.equal(order.indices, expected.indices) and torch.equal(g.get_state(), state)


def test_random_orders_are_uniform():
    order = GenerationOrder("random", (1, 3))(torch.zeros(6000, dtype=torch.long), generator())
    counts = (order.indices @ torch.tensor([9, 3, 1])).unique(return_counts=True)[1] / 6000
    assert len(counts) == 6 and (counts - 1 / 6).abs().max() < 4 * (5 / 36 / 6000) ** 0.5  # four standard errors


def test_collapse_takes_the_order_of_the_class_and_reversed_its_opposite(bank):
    labels = torch.tensor([1, 0, 1])
    expected = torch.stack([(torch.arange(24) + 8 * label) % 24 for label in labels])
    for order in (GenerationOrder("collapse", GRID, bank), GenerationOrder(bank, GRID)):
        assert order.name == "collapse" and torch.equal(order(labels, generator()).indices, expected)
    for source in ("bank", "mean"):
        reverse = GenerationOrder("collapse_reversed", GRID, bank, source)
        assert torch.equal(reverse(labels, generator()).indices, expected.flip(1))


def test_source_and_temperature_reach_the_bank():
    first, second = torch.arange(24), torch.arange(24).roll(1)
    orders = Order.from_indices(torch.stack([first, second, second]), GRID)
    bank = ClassOrderBank.build([(orders, torch.zeros(3, dtype=torch.long))], 1)
    labels = torch.zeros(50, dtype=torch.long)
    assert len(GenerationOrder(bank, GRID)(labels, generator()).indices.unique(dim=0)) == 2
    mean = GenerationOrder(bank, GRID, source="mean")(labels, generator())
    assert torch.equal(mean.indices, bank.sample(torch.tensor([0]), source="mean").indices.expand(50, -1))
    noisy = GenerationOrder(bank, GRID, source="mean", temperature=0.1)(labels, generator())
    assert len(noisy.indices.unique(dim=0)) == 50


def test_given_orders_one_each_or_one_for_all():
    indices = torch.rand(3, 24).argsort(1)
    labels = torch.tensor([5, 5, 5])
    for given in (indices, Order.from_indices(indices, GRID)):
        order = GenerationOrder(given, GRID)
        assert order.name == "given" and torch.equal(order(labels).indices, indices)
        with pytest.raises(CollapseError, match="order must be one for all or one a label, got 3 for 2"):
            order(labels[:2])
    one = GenerationOrder(indices[:1], GRID)
    assert torch.equal(one(labels).indices, indices[:1].expand(3, -1)) and torch.equal(one(None).indices, indices[:1])


def test_temperature_moves_any_order_more_and_more():
    labels = torch.zeros(200, dtype=torch.long)
    moved = [
        (GenerationOrder("raster", GRID, temperature=t)(labels, generator()).ranks - torch.arange(24))
        .abs()
        .float()
        .mean()
        for t in (0, 1e-4, 0.05, 0.5, 1e4)
    ]
    assert moved[0] == moved[1] == 0 < moved[2] < moved[3] < moved[4]
    assert abs(moved[4] - (24 * 24 - 1) / (3 * 24)) < 0.2  # random order: (N^2 - 1) / 3N places


def test_random_share_is_the_share_of_random_orders(bank):
    labels = torch.zeros(4000, dtype=torch.long)
    order = GenerationOrder(bank, GRID, random_share=0.25)(labels, generator())
    own = (order.indices == torch.arange(24)).all(1).float().mean()
    assert abs(own - 0.75) < 4 * (0.25 * 0.75 / 4000) ** 0.5
    everything = GenerationOrder("raster", GRID, random_share=1)(labels[:100], generator())
    assert len(everything.indices.unique(dim=0)) == 100


def test_confidence_is_left_to_the_sampler():
    order = GenerationOrder("confidence", GRID)
    assert order.dynamic and order.plan(5) == tokens_per_step(24, 5)
    with pytest.raises(CollapseError, match="'confidence' is chosen by the sampler"):
        order(torch.zeros(2, dtype=torch.long))
    for wrong in ({"temperature": 0.1}, {"random_share": 0.1}):
        with pytest.raises(CollapseError, match="temperature and random_share must be 0"):
            GenerationOrder("confidence", GRID, **wrong)


def test_repr(bank):
    assert repr(GenerationOrder("halton", GRID)) == (
        "GenerationOrder('halton', 4x6 tokens, temperature=0.0, random_share=0.0)"
    )
    assert "source='mean', temperature=0.1" in repr(GenerationOrder(bank, GRID, source="mean", temperature=0.1))


@pytest.mark.parametrize(
    "order, message",
    [
        ("spiral", "order must be one of random, raster.*got 'spiral'"),
        ("given", "order must be one of random, raster.*got 'given'"),
        ("variance", "order must be one of random, raster.*got 'variance'"),
        (None, r"order must be an Order on the grid \(4, 6\).*got NoneType"),
        (torch.arange(24), r"order must be .*shape \(B, 24\), or one of .*got a int64 tensor of shape \(24,\)"),
        (torch.arange(23)[None], r"got a int64 tensor of shape \(1, 23\)"),
        (torch.zeros(0, 24).long(), r"got a int64 tensor of shape \(0, 24\)"),
        (torch.arange(24.0)[None], "order must be .*: indices must be a long tensor"),
        (torch.zeros(2, 24).long(), "order must be .*each of 0..23 once in every row.*row 0"),
        (Order(torch.rand(1, 24), (6, 4)), r"order must be an Order on the grid \(4, 6\).*6x4.*resample"),
        ("collapse", "bank must be a ClassOrderBank for the order 'collapse', got NoneType None"),
        ("collapse_reversed", "bank must be a ClassOrderBank for the order 'collapse_reversed'"),
    ],
)
def test_wrong_orders(order, message):
    with pytest.raises(CollapseError, match=message):
        GenerationOrder(order, GRID)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"grid": (6, 4)}, r"bank must be on the grid \(6, 4\) of the tokens, got \(4, 6\); see .*resample"),
        ({"grid": (4, 0)}, "grid must be two positive ints"),
        ({"bank": 3}, "bank must be None where order is a ClassOrderBank itself"),
        ({"source": "median"}, "source must be one of bank, mean, got 'median'"),
        ({"temperature": -0.1}, "temperature must be a number of at least 0, got -0.1"),
        ({"temperature": math.nan}, "temperature must be a number of at least 0, got nan"),
        ({"random_share": 1.1}, r"random_share must be a number in \[0, 1\], got 1.1"),
        ({"random_share": None}, r"random_share must be a number in \[0, 1\], got None"),
    ],
)
def test_wrong_arguments(bank, wrong, message):
    with pytest.raises(CollapseError, match=message):
        GenerationOrder(bank, **{"grid": GRID, **wrong})


@pytest.mark.parametrize("labels", [torch.zeros(2), torch.zeros(2, 1).long(), torch.zeros(0).long(), [0], True])
def test_wrong_labels(labels):
    with pytest.raises(CollapseError, match=r"labels must be a long tensor of shape \(B,\), B at least 1, got"):
        GenerationOrder("raster", GRID)(labels)
