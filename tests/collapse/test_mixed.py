"""Mixed resolution: remainder="mixed" and the pyramid it is made of, against what a person would draw."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from timm_collapse import CollapseError, Order, collapse
from timm_collapse.collapse.pyramid import choose_leaves, cover_of_leaves, plan_splits, pyramid_shapes

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


FAMILIES = (
    "vit_tiny_patch16_224",
    "vit_small_patch16_dinov3",
    "vit_small_patch16_rope_mixed_224",
    "naflexvit_base_patch16_gap",
    "cait_xxs24_224",
    "beit_base_patch16_224",
)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_within_the_budget_dense_and_trainable(name):
    model = vit(name, **({"img_size": None} if "naflex" in name else {}))
    for key, parameter in model.named_parameters():
        nn.init.constant_(parameter, 0.7) if "gamma" in key else nn.init.normal_(parameter, std=0.1)
    collapse(model, "bayer", keep=0.25, remainder="mixed")
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
    assert asked == [256]  # cells are split by the mean rank of all their patches
    model.keep, model.coarse_share = 18, 1.0
    model(images)
    assert len(asked) == 1  # nothing is split, so no order is needed


@pytest.mark.parametrize("patch_size, keep", [(16, 0.4), (8, 0.1)])
def test_tokens_are_the_same_whether_the_order_is_given_or_made(patch_size, keep):
    model = vit(img_size=224, patch_size=patch_size)
    collapse(model, "collapse_ranker_tiny_224", keep=keep, remainder="mixed")
    images = torch.randn(1, 3, 224, 224)
    assert torch.equal(
        model.forward_features(images), model.forward_features(images, order=model.compute_order(images))
    )


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
