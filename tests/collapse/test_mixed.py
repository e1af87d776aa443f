"""Mixed resolution: remainder="mixed" and the pyramid it is made of, against what a person would draw."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from timm_collapse import CollapseError, Order, collapse
from timm_collapse.collapse.cells import mean_of_cells
from timm_collapse.collapse.pyramid import (
    choose_leaves,
    count_leaves,
    cover_of_leaves,
    plan_splits,
    pyramid_shapes,
    split_shapes,
)
from timm_collapse.models.tokenizer import resize_images

SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 64, "patch_size": 4, "num_classes": 5}


def vit(name="vit_tiny_patch16_224", **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, **{key: v for key, v in {**SMALL, **kwargs}.items() if v is not None}).eval()


def test_shapes_and_splits_closed_forms():
    assert pyramid_shapes(64, (16, 16), 0.5) == [(16, 16), (8, 8), (4, 4)]
    assert pyramid_shapes(64, (16, 16), 1.0) == [(16, 16), (8, 8)]
    assert pyramid_shapes(40, (12, 20), 0.5) == [(12, 20), (6, 10), (3, 5)]
    assert pyramid_shapes(16, (12, 20), 0.5) == [(12, 20), (6, 10), (3, 5)]  # over the share, within the budget
    assert plan_splits(64, [(16, 16), (8, 8), (4, 4)]) == [8, 8]
    assert plan_splits(18, [(16, 16), (8, 8), (4, 4)]) == [0, 0]
    assert plan_splits(19, [(16, 16), (8, 8), (4, 4)]) == [0, 1]
    for budget in range(16, 256):
        shapes = pyramid_shapes(budget, (16, 16), 0.25)
        splits = plan_splits(budget, shapes)
        cells = [h * w for h, w in shapes]
        assert budget - 2 <= cells[-1] + 3 * sum(splits) <= budget
        allowed = [*(4 * split for split in splits[1:]), cells[-1]]
        assert all(0 <= split <= limit for split, limit in zip(splits, allowed, strict=True))


@pytest.mark.parametrize("budget, grid", [(48, (14, 14)), (100, (7, 7)), (2, (12, 4)), (20, (5, 6))])
def test_grids_that_cannot_be_halved_are_refused(budget, grid):
    with pytest.raises(CollapseError, match=rf"halved .* times, .* keep is {budget}"):
        pyramid_shapes(budget, grid, 0.5)


def test_two_sizes_on_any_grid_closed_forms():
    assert split_shapes(128, (16, 16), 0.5) == [(16, 16), (8, 8)]
    assert split_shapes(64, (16, 16), 0.5) == [(12, 10), (6, 5)]
    assert split_shapes(64, (16, 16), 1.0) == [(16, 16), (8, 8)]
    assert split_shapes(128, (14, 14), 0.5) == [(14, 14), (7, 7)]  # not 8 x 8: cells have 2 x 2 patches at least
    assert split_shapes(43, (14, 14), 0.5) == [(10, 8), (5, 4)]
    assert split_shapes(500, (37, 37), 0.5) == [(32, 30), (16, 15)]
    assert split_shapes(2, (14, 14), 0.5) == [(2, 2), (1, 1)]
    for grid in ((16, 16), (14, 14), (8, 12), (6, 4), (2, 2)):
        for budget in range(1, grid[0] * grid[1]):
            for share in (0.3, 0.5, 1.0):
                shapes = split_shapes(budget, grid, share)
                counts = count_leaves(shapes, plan_splits(budget, shapes))
                assert min(counts) >= 0 and shapes[0][0] <= grid[0] and shapes[0][1] <= grid[1]
                assert budget - 2 <= sum(counts) <= budget or counts[1] == 0 and sum(counts) < budget


def test_leaves_of_a_drawn_example():
    ranks = torch.arange(1, 17).view(1, 4, 4).clone()
    ranks[0, 2, 3] = 0  # the lower right quarter comes first: its patches have ranks 11, 0, 15, 16
    ranks[0, 2:, 2:] = torch.tensor([[1, 0], [2, 3]])
    ranks = ranks.flatten(1).argsort(1).argsort(1)
    kept, leaves = choose_leaves(Order.from_ranks(ranks, (4, 4)), [(4, 4), (2, 2)], [1])
    assert kept.tolist() == [[10, 11, 14, 15]] and leaves.tolist() == [[0, 1, 2]]
    cover = cover_of_leaves([leaves], [(4, 4), (2, 2)]).view(4, 4)
    assert cover[:2].tolist() == [[0, 0, 1, 1]] * 2 and cover[2:, :2].tolist() == [[2, 2]] * 2


@pytest.mark.parametrize("budget, share", [(16, 0.5), (50, 0.5), (130, 0.2), (200, 0.1)])
def test_leaves_cover_every_patch_once(budget, share):
    grid = (16, 24)
    order = Order(torch.rand(3, 384), grid)
    shapes = pyramid_shapes(budget, grid, share)
    kept, *leaves = choose_leaves(order, shapes, plan_splits(budget, shapes))
    area = torch.zeros(3, *grid)
    for level, cells in enumerate([kept, *leaves]):
        scale = 2**level
        for image in range(3):
            for cell in cells[image].tolist():
                row, column = divmod(cell, grid[1] // scale)
                area[image, row * scale : (row + 1) * scale, column * scale : (column + 1) * scale] += 1
    assert (area == 1).all()
    cover, offset = cover_of_leaves(leaves, shapes), 0
    for level, cells in enumerate(leaves, 1):
        columns = grid[1] >> level
        for image in range(3):
            for number, cell in enumerate(cells[image].tolist(), offset):
                row, column = divmod(cell, columns)
                assert (cover[image].view(grid)[row << level, column << level]) == number
        offset += cells.shape[1]
    assert budget - 2 <= kept.shape[1] + sum(cells.shape[1] for cells in leaves) <= budget


@pytest.mark.parametrize("remainder, keep", [("mixed", 64), ("split", 64), ("split", 100)])
def test_detailed_patches_are_those_of_the_smallest_cells(remainder, keep):
    model = collapse(vit(), "bayer", keep=keep, remainder=remainder)
    order = Order(torch.rand(2, 256), (16, 16))
    plan = model.plan(keep, (16, 16))
    fine, (h, w) = choose_leaves(order, plan.shapes, plan.splits)[0], plan.shapes[0]
    detailed = plan.detailed(order).view(2, 16, 16)
    for image in range(2):
        points = torch.zeros(16 * h, 16 * w)  # of which each cell has 16 x 16, each patch h x w
        for cell in fine[image].tolist():
            row, column = 16 * (cell // w), 16 * (cell % w)
            points[row : row + 16, column : column + 16] = 1
        expected = points.view(16, h, 16, w).mean((1, 3))
        assert torch.allclose(detailed[image], expected, atol=1e-5)


@pytest.mark.parametrize("keep, places", [(17, 56), (40, 56), (64, 64), (250, 250)])
def test_cells_go_by_a_fifth_of_the_order_at_least(keep, places):
    assert collapse(vit(), "bayer", keep=keep, remainder="split").plan(keep, (16, 16)).places == places


def test_early_regions_are_fine():
    scores = torch.zeros(1, 16, 16)
    scores[0, 4:8, 8:12] = 1
    order = Order(scores.flatten(1), (16, 16))
    kept, *_ = choose_leaves(order, [(16, 16), (8, 8), (4, 4)], [4, 1])
    assert torch.equal(kept, scores.flatten(1).nonzero()[:, 1][None])


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "beit_base_patch16_224"])
def test_tokens_are_patches_of_smaller_images(name):
    model = vit(name, **({"use_abs_pos_emb": True} if "beit" in name else {}))
    nn.init.normal_(model.pos_embed)
    collapse(model, "bayer", keep=64, remainder="mixed")
    images, order = torch.randn(2, 3, 64, 64), Order(torch.rand(2, 256), (16, 16))
    selection = model.select(images, order)
    kept, *leaves = choose_leaves(order, [(16, 16), (8, 8), (4, 4)], [8, 8])
    assert torch.equal(selection.kept, kept) and kept.shape == (2, 32)
    expected = []
    for level, cells in enumerate(leaves, 1):
        small = F.interpolate(images, scale_factor=0.5**level, mode="bilinear", antialias=True)
        positions = F.avg_pool2d(model.pos_embed[:, 1:].mT.reshape(1, -1, 16, 16), 2**level)
        tokens = (model.patch_embed.proj(small) + positions).flatten(2).mT
        expected.append(torch.stack([tokens[image, cells[image]] for image in range(2)]))
    assert torch.allclose(selection.extra, torch.cat(expected, 1), atol=1e-5)
    rows, columns = selection.places // 16, selection.places % 16
    first = leaves[0].shape[1]
    assert torch.equal(rows[:, :first] // 2 * 8 + columns[:, :first] // 2, leaves[0])
    assert torch.equal(rows[:, first:] // 4 * 4 + columns[:, first:] // 4, leaves[1])


@pytest.mark.parametrize(
    "size, keep, share", [(56, 43, 1.0), (56, 43, 0.5), (56, 100, 0.5), (28, 9, 0.5), (20, 2, 0.5)]
)
def test_cells_of_two_sizes_cover_any_grid(size, keep, share):
    model = vit(img_size=size)
    nn.init.normal_(model.pos_embed)
    collapse(model, "bayer", keep=keep, remainder="split", coarse_share=share, area_bias=1.0)
    images, n = torch.randn(2, 3, size, size), size // 4
    order = Order(torch.rand(2, n * n), (n, n))
    selection = model.select(images, order)
    shapes = split_shapes(keep, (n, n), share)
    small, large = choose_leaves(order, shapes, plan_splits(keep, shapes))
    kept = small.shape[1] if shapes[0] == (n, n) else 0
    assert selection.kept.shape[1] == kept and selection.extra.shape[1] == small.shape[1] - kept + large.shape[1]
    assert kept + selection.areas.sum() == pytest.approx(n * n, rel=1e-5)
    cover, areas = selection.cover(), selection.areas[0]
    rows, columns = selection.places // n, selection.places % n
    for image in range(2):
        dropped = torch.ones(n * n, dtype=torch.bool).scatter(0, selection.kept[image], False).nonzero()[:, 0]
        covering = cover[image][dropped]  # each patch's token is the one whose centre is within its cell's half
        reach = 0.5 * areas[covering].sqrt() * 1.25 + 1
        assert ((rows[image][covering] - dropped // n).abs() <= reach).all()
        assert ((columns[image][covering] - dropped % n).abs() <= reach).all()
        assert len(covering.unique()) == selection.extra.shape[1]
    expected = []
    for shape, leaf in zip(shapes, (small, large)):
        whole = model.patch_embed.proj(resize_images(images, (4 * shape[0], 4 * shape[1]))).flatten(2).mT
        whole = whole + mean_of_cells(model.pos_embed[:, 1:], (n, n), shape)
        expected.append(torch.stack([whole[image, leaf[image]] for image in range(2)]))
    assert torch.allclose(selection.extra, torch.cat(expected, 1)[:, kept:], atol=1e-5)
    assert model(images, order=order).isfinite().all()


FAMILIES = (
    "vit_tiny_patch16_224",
    "vit_small_patch16_dinov3",
    "vit_small_patch16_rope_mixed_224",
    "naflexvit_base_patch16_gap",
    "cait_xxs24_224",
    "beit_base_patch16_224",
)


@pytest.mark.parametrize("remainder", ["mixed", "split", "zoom"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_within_the_budget_dense_and_trainable(name, remainder):
    model = vit(name, **({"img_size": None} if "naflex" in name else {}))
    for key, parameter in model.named_parameters():
        nn.init.constant_(parameter, 0.7) if "gamma" in key else nn.init.normal_(parameter, std=0.1)
    collapse(model, "bayer", keep=0.25, remainder=remainder)
    images, order = torch.randn(2, 3, 64, 64), Order(torch.rand(2, 256), (16, 16))
    features = model.forward_features(images, order=order)
    assert features.shape[1] - model.num_prefix_tokens in (62, 63, 64)
    (last,) = model.forward_intermediates(images, indices=1, output_fmt="NLC", intermediates_only=True, order=order)
    assert last.shape == (2, 256, 32)
    assert all(len(last[i].unique(dim=0)) == features.shape[1] - model.num_prefix_tokens for i in range(2))
    model(images, order=order).sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "patch_embed" in n or "embeds.proj" in n)
    assert not torch.allclose(model(images, order=order), model(images, order=order.reversed()))


def test_no_order_is_asked_for_where_nothing_is_split():
    model = collapse(vit(), "collapse_ranker_tiny", keep=64, remainder="mixed")
    images = torch.randn(1, 3, 64, 64)
    asked = []
    own = model.orderer.forward
    model.orderer.forward = lambda *args, upto=None, **kwargs: asked.append(upto) or own(*args, upto=upto, **kwargs)
    model(images)
    assert asked == [64]  # no more of the order is worth its cost
    model.keep, model.coarse_share = 18, 1.0
    model(images)
    assert len(asked) == 1  # nothing is split, so no order is needed


@pytest.mark.parametrize("patch_size, keep", [(16, 0.4), (8, 0.1)])
def test_tokens_are_the_same_whether_the_order_is_given_or_made(patch_size, keep):
    model = vit(img_size=224, patch_size=patch_size)
    collapse(model, "collapse_ranker_tiny_224", keep=keep, remainder="mixed")
    images = torch.randn(1, 3, 224, 224)
    grid = model.patch_embed.grid_size
    order = model.compute_order(images, upto=model.plan(round(keep * grid[0] * grid[1]), grid).places)
    assert torch.equal(model.forward_features(images), model.forward_features(images, order=order))


def test_a_budget_under_the_coarsest_cells_is_refused():
    model = collapse(vit(img_size=48), "bayer", keep=8, remainder="mixed")
    with pytest.raises(CollapseError, match="mixed.*halved 2 times, to 9 cells, and keep is 8"):
        model(torch.randn(1, 3, 48, 48))
    model.keep = 9
    assert model.forward_features(torch.randn(1, 3, 48, 48)).shape[1] == 10


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_nothing_is_lost_of_a_flat_image(share):
    """Where all of the image is alike, tokens of every size are alike, but for their positions."""
    model = vit()
    nn.init.zeros_(model.pos_embed)
    collapse(model, "bayer", keep=100, remainder="mixed", coarse_share=share)
    images = torch.full((1, 3, 64, 64), 0.7)
    tokens = model.forward_features(images)[0, 1:]
    assert torch.allclose(tokens, tokens[:1].expand_as(tokens), atol=1e-5)
