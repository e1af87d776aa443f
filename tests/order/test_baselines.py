"""Baselines and the spread orders behind two of them."""

import math
from fractions import Fraction

import pytest
import torch

from timm_collapse.order import BASELINES, CollapseError, Order, baseline_scores, bayer_ranks, halton_ranks

GRIDS = [(1, 1), (1, 9), (9, 1), (4, 4), (7, 5), (14, 14), (37, 37), (3, 50)]


def images_of(batch=2, height=28, width=28, seed=0):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


def first(name, images, grid, **kwargs):
    return Order(baseline_scores(name, images, grid, **kwargs), grid).indices


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("grid", [(14, 14), (7, 5), (1, 9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_baseline_gives_scores_for_every_grid(name, grid, dtype):
    scores = baseline_scores(name, images_of().to(dtype), list(grid))
    assert scores.shape == (2, grid[0] * grid[1]) and scores.dtype == torch.float32
    Order(scores, grid)  # no NaN


@pytest.mark.parametrize("name", ["raster", "centre", "halton", "bayer"])
def test_fixed_baselines_do_not_look_at_the_image(name):
    scores = baseline_scores(name, images_of(), (7, 5))
    assert torch.equal(scores[0], scores[1])
    assert torch.equal(scores, baseline_scores(name, images_of(seed=1), (7, 5)))


def test_raster():
    assert first("raster", images_of(1), (2, 3)).tolist() == [list(range(6))]


def test_centre_by_hand():
    assert first("centre", images_of(1), (3, 3)).tolist() == [[4, 1, 3, 5, 7, 0, 2, 6, 8]]
    distances = [math.dist((y, x), (3, 2)) for y in range(7) for x in range(5)]
    torch.testing.assert_close(baseline_scores("centre", images_of(1), (7, 5))[0], -torch.tensor(distances))


def test_random_is_the_generators():
    def seeded(seed):
        return baseline_scores("random", images_of(), (14, 14), generator=torch.Generator().manual_seed(seed))

    assert torch.equal(seeded(0), seeded(0))
    assert not torch.equal(seeded(0), seeded(1))
    assert not torch.equal(seeded(0)[0], seeded(0)[1])  # another order for every image
    many = images_of(1, 8, 8).expand(4000, -1, -1, -1)
    counts = torch.bincount(
        first("random", many, (2, 2), generator=torch.Generator().manual_seed(0))[:, 0], minlength=4
    )
    assert (counts - 1000).abs().max() < 6 * math.sqrt(4000 * 3 / 16)


def test_variance_against_plain_torch():
    images = images_of(2, 28, 30) * images_of(2, 28, 30, seed=1) + 5
    patches = images.unfold(2, 4, 4).unfold(3, 6, 6)  # (2, 3, 7, 5, 4, 6)
    expected = patches.permute(0, 2, 3, 1, 4, 5).flatten(3).var(dim=3, correction=0).flatten(1)
    torch.testing.assert_close(baseline_scores("variance", images, (7, 5)), expected, rtol=1e-4, atol=1e-5)


def test_variance_of_flat_patches_far_from_zero():
    images = torch.full((1, 3, 8, 8), 1000.0)
    images[:, :, :4, 4:] += 0.01 * images_of(1, 4, 4)
    scores = baseline_scores("variance", images, (2, 2))
    assert scores.argmax() == 1 and (scores >= 0).all() and scores[0, [0, 2, 3]].max() < 1e-6


def test_variance_is_never_negative():
    flat = images_of(100, 3, 3).repeat_interleave(5, dim=2).repeat_interleave(5, dim=3)[:, :1].expand(-1, 3, -1, -1)
    scores = baseline_scores("variance", flat, (3, 3))
    rounding = torch.finfo(torch.float32).eps * flat.square().max()  # of E[x^2] and of E[x]^2
    assert (scores >= 0).all() and scores.max() < 8 * rounding


def test_centre_variance_against_loops():
    images = images_of(2, 12, 30)
    variances = baseline_scores("variance", images, (3, 5))
    scores = baseline_scores("centre_variance", images, (3, 5))
    for n in range(15):
        down, right = (n // 5 - 1) / 3, (n % 5 - 2) / 5  # from the centre, in sides of the image
        weight = math.exp(-(down**2 + right**2) / (2 * 0.375**2))
        torch.testing.assert_close(scores[:, n], variances[:, n].sqrt() * weight)


def test_gradient_against_loops():
    image = images_of(1, 6, 4)
    magnitude = torch.zeros(6, 4)
    for y in range(6):
        for x in range(4):
            down, right = min(y + 1, 5), min(x + 1, 3)
            for c in range(3):
                dy = image[0, c, down, x] - image[0, c, y, x]
                dx = image[0, c, y, right] - image[0, c, y, x]
                magnitude[y, x] += math.hypot(dx, dy) / 3
    expected = magnitude.view(3, 2, 2, 2).mean(dim=(1, 3)).flatten()
    torch.testing.assert_close(baseline_scores("gradient", image, (3, 2))[0], expected)


def test_gradient_sees_the_finest_texture():
    images = torch.zeros(1, 3, 8, 8)
    images[:, :, 4:, :4] = (torch.arange(4)[:, None] + torch.arange(4)) % 2
    assert baseline_scores("gradient", images, (2, 2)).argmax() == 2


def test_errors():
    with pytest.raises(CollapseError, match="random, raster, .*, centre_variance, gradient, got 'center'"):
        baseline_scores("center", images_of(), (2, 2))
    with pytest.raises(CollapseError, match="uint8.*normalise"):
        baseline_scores("random", torch.zeros(1, 3, 8, 8, dtype=torch.uint8), (2, 2))
    with pytest.raises(CollapseError, match=r"grid .*\(2, 0\)"):
        baseline_scores("random", images_of(), (2, 0))


# ---- spread


def test_bayer_is_the_published_matrix():
    published = [[0, 8, 2, 10], [12, 4, 14, 6], [3, 11, 1, 9], [15, 7, 13, 5]]
    assert bayer_ranks((4, 4)).view(4, 4).tolist() == published
    assert bayer_ranks((2, 2)).tolist() == [0, 2, 3, 1]


@pytest.mark.parametrize("half", [4, 16])
def test_bayer_recursion(half):
    # the lowest bit of the position decides the coarsest level: each of the four sublattices is the smaller matrix
    small = bayer_ranks((half, half)).view(half, half)
    doubled = bayer_ranks((2 * half, 2 * half)).view(half, 2, half, 2)
    for quarter, (y, x) in enumerate([(0, 0), (1, 1), (0, 1), (1, 0)]):
        lattice = doubled[:, y, :, x]
        assert torch.equal(lattice, small + quarter * half * half)


@pytest.mark.parametrize("ranks_of", [bayer_ranks, halton_ranks])
@pytest.mark.parametrize("grid", [*GRIDS, (224, 224), (1, 5000)])
def test_spread_ranks_visit_every_cell_once(ranks_of, grid):
    ranks = ranks_of(grid)
    assert ranks.dtype == torch.long
    assert torch.equal(ranks.sort().values, torch.arange(grid[0] * grid[1]))


@pytest.mark.parametrize("grid", GRIDS)
def test_halton_against_fractions(grid):
    def radical_inverse(n, base):
        value, scale = Fraction(0), Fraction(1)
        while n:
            scale /= base
            value, n = value + n % base * scale, n // base
        return value

    height, width = grid
    visited, n = [], 0
    while len(visited) < min(height * width, 200):
        n += 1
        cell = int(radical_inverse(n, 3) * height) * width + int(radical_inverse(n, 2) * width)
        if cell not in visited:
            visited.append(cell)
    assert halton_ranks(grid).argsort()[: len(visited)].tolist() == visited


def test_halton_is_not_shared_with_the_cache():
    halton_ranks((4, 4)).zero_()
    assert halton_ranks((4, 4)).sum() == 120


@pytest.mark.parametrize("ranks_of", [bayer_ranks, halton_ranks])
@pytest.mark.parametrize("grid", [(7, 7), (9, 9), (14, 14), (37, 37), (10, 20)])
def test_spread_orders_leave_smaller_holes_than_chance(ranks_of, grid):
    height, width = grid
    cells = torch.cartesian_prod(torch.arange(height), torch.arange(width)).double()

    def mean_hole(ranks, ratio):  # how far a patch is from the nearest kept one, on average
        return torch.cdist(cells, cells[ranks < ratio * height * width]).min(dim=1).values.mean()

    generator = torch.Generator().manual_seed(0)
    for ratio in (0.1, 0.22):
        chance = [mean_hole(torch.randperm(height * width, generator=generator), ratio) for _ in range(50)]
        assert mean_hole(ranks_of(grid), ratio) < torch.stack(chance).mean()
