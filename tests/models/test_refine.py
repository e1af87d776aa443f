"""Exact CoMAE orders on grids finer than the CoMAE's own."""

import pytest
import torch
import torch.nn.functional as F

from timm_collapse import CollapseError, CollapseOrder, CoMAE, pagerank
from timm_collapse.models.refine import crop_cells, hierarchical_dependency
from timm_collapse.order import Order


def comae():
    torch.manual_seed(0)
    model = CoMAE(img_size=16, patch_size=4, dim=32, depth=1, decoder_dim=32, decoder_depth=1)
    with torch.no_grad():
        for parameter in model.encoder.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def test_crops_are_the_cells():
    images = torch.randn(2, 3, 24, 32)
    cells = torch.tensor([5, 11])  # of a grid of 3 x 4: rows 1 and 2, columns 1 and 3
    assert torch.allclose(crop_cells(images, cells, (3, 4), 8)[0], images[0, :, 8:16, 8:16], atol=1e-5)
    assert torch.allclose(crop_cells(images, cells, (3, 4), 8)[1], images[1, :, 16:24, 24:32], atol=1e-5)
    twice = F.interpolate(images[:1], scale_factor=2, mode="bilinear")  # inside, where no border is seen
    assert torch.allclose(crop_cells(images[:1], cells[:1], (3, 4), 16)[0], twice[0, :, 16:32, 16:32], atol=1e-5)


def test_refined_cells_have_the_graph_of_their_crop():
    model, images = comae(), torch.randn(2, 3, 64, 64)
    graph = hierarchical_dependency(model, images, (16, 16), refine=0.25)
    coarse = model.dependency(F.interpolate(images, (16, 16), mode="bilinear", antialias=True))
    assert graph.grid == (16, 16) and torch.equal(graph.coarse, coarse)
    assert torch.equal(graph.cells, Order(pagerank(coarse), (4, 4)).keep(0.25))
    for image, cells in enumerate(graph.cells.tolist()):
        for place, cell in enumerate(cells):
            row, column = cell // 4 * 16, cell % 4 * 16
            crop = images[image : image + 1, :, row : row + 16, column : column + 16]
            assert torch.allclose(graph.inner[image, place], model.dependency(crop)[0], atol=1e-4)


def test_levels_go_on_until_the_grid_is_fine_enough():
    model, images = comae(), torch.randn(1, 3, 40, 48)
    assert isinstance(hierarchical_dependency(model, images, (4, 3)), torch.Tensor)
    assert hierarchical_dependency(model, images, (5, 3)).grid == (16, 16)
    assert hierarchical_dependency(model, images, (17, 16), refine=0.1).grid == (64, 64)


def test_the_refined_order_refines_the_coarse_one():
    model, images = comae(), torch.randn(2, 3, 64, 64)
    published = CollapseOrder(model, "pagerank", evidence="weights")
    plain = published(images, grid=(16, 16))
    order = CollapseOrder(model, refine=0.5)(images, grid=(16, 16))
    assert order.grid == plain.grid and not torch.equal(order.ranks, plain.ranks)
    assert CollapseOrder(model, refine=0.5)(images, grid=(20, 12)).grid == (20, 12)
    coarse = CollapseOrder(model, refine=0.5)(images)
    assert torch.equal(coarse.ranks, published(images).ranks)  # nothing to refine
    # inside a refined cell, the places differ from image to image; Bayer's are the same in all
    cells = coarse.keep(0.5)
    ranks = order.ranks.view(2, 4, 4, 4, 4).transpose(2, 3).reshape(2, 16, 16)
    places = [tuple(ranks[i, cell].argsort().tolist()) for i in range(2) for cell in cells[i].tolist()]
    assert len(set(places)) > 8


def test_orders_are_the_same_under_autocast():
    model, images = CollapseOrder(comae(), refine=0.3), torch.rand(2, 3, 64, 64)
    plain = model(images, grid=(16, 16))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(images, grid=(16, 16)).ranks, plain.ranks)
    assert model(images.bfloat16().float(), grid=(16, 16)).grid == (16, 16)


def test_wrong_arguments():
    model, images = comae(), torch.randn(1, 3, 16, 16)
    for call, message in (
        (lambda: hierarchical_dependency(model, images, (8, 8), refine=0), r"refine must be in \(0, 1\], got 0"),
        (lambda: hierarchical_dependency(model, images[0], (8, 8)), "images"),
        (lambda: hierarchical_dependency(model, images, (0, 8)), "grid"),
        (lambda: CollapseOrder(model, refine=1.5), r"refine: must be in \[0, 1\].*1.5"),
        (lambda: CollapseOrder(model, refine=0.2, ranking="coverage"), "refine.*coverage"),
        (lambda: CollapseOrder(model, refine=0.2, evidence="errors"), "refine.*errors"),
        (lambda: CollapseOrder("bayer", refine=0.2), "refine.*bayer"),
        (lambda: CollapseOrder(model, refine="much"), "refine.*much"),
    ):
        with pytest.raises(CollapseError, match=message):
            call()
