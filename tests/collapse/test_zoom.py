"""remainder="zoom": a grid whose rows and columns follow the order, against slow references and closed forms."""

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from timm_collapse import CollapseError, Order, collapse
from timm_collapse.collapse.cells import interval_shares, weighted_axes
from timm_collapse.collapse.zoom import (
    axis_edges,
    interval_of_parts,
    pairs_of,
    places_of_intervals,
    resample_axes,
    zoom_densities,
)
from timm_collapse.models.tokenizer import resize_images

SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 64, "patch_size": 4, "num_classes": 5}


def vit(name="vit_tiny_patch16_224", **kwargs):
    torch.manual_seed(0)
    model = timm.create_model(name, **{**SMALL, **kwargs}).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def corner_order(grid=(16, 16), corner=(slice(0, 6), slice(10, 16))):
    scores = torch.rand(2, *grid) * 0.1
    scores[:, corner[0], corner[1]] += 1
    return Order(scores.flatten(1), grid)


def test_edges_closed_forms():
    assert axis_edges(torch.tensor([[1.0, 3.0]]), 2)[0].tolist() == pytest.approx([0, 4 / 3, 2])
    assert axis_edges(torch.tensor([[2.0, 2.0, 2.0]]), 2)[0].tolist() == pytest.approx([0, 1.5, 3])
    assert axis_edges(torch.tensor([[1.0, 1.0, 2.0]]), 4)[0].tolist() == pytest.approx([0, 1, 2, 2.5, 3])


def test_edges_are_the_inverse_of_the_cumulated_density():
    density = torch.rand(5, 13, dtype=torch.float64) + 0.01
    edges = axis_edges(density, 7)
    for row, found in zip(density.numpy(), edges.numpy()):
        cumulated = np.concatenate([[0], row.cumsum()]) / row.sum()
        assert np.allclose(found, np.interp(np.arange(8) / 7, cumulated, np.arange(14)))


@pytest.mark.parametrize("size", [(32, 32), (44, 24), (64, 80)])
def test_even_densities_are_the_resize_that_all_else_uses(size):
    images = torch.randn(2, 3, 64, 64)
    even = torch.full((2, 16), 0.7), torch.full((2, 8), 3.0)
    assert torch.allclose(resample_axes(images, even, size), resize_images(images, size), atol=1e-4)
    assert resample_axes(images.bfloat16(), even, size).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(resample_axes(images, even, size), resize_images(images, size), atol=1e-4)


def test_a_pixel_shows_what_lies_at_its_place():
    """Of pictures whose values are their own coordinates, resampling gives the middles of the intervals."""
    densities = torch.tensor([[1.0, 1, 4, 2, 1, 1, 1, 1]]).expand(1, -1), torch.tensor([[3.0, 1, 1, 1]])
    rows, columns = torch.meshgrid(torch.arange(64) + 0.5, torch.arange(64) + 0.5, indexing="ij")
    found = resample_axes(torch.stack([rows, columns])[None], densities, (32, 16))[0]
    middle = [(edges[:, 1:] + edges[:, :-1])[0] / 2 for edges in map(axis_edges, densities, (32, 16))]
    assert torch.allclose(found[0, 2:-2, 0], middle[0][2:-2] * 8, atol=0.3)
    assert torch.allclose(found[1, 0, 2:-2], middle[1][2:-2] * 16, atol=0.6)


def test_densities_follow_the_first_half_of_the_order_and_have_a_floor():
    order = corner_order()
    rows, columns = zoom_densities(order, 0.4)
    for density in (rows, columns):
        assert torch.allclose(density.mean(1), torch.ones(2), atol=1e-5) and density.min() >= 0.4 - 1e-6
    assert (rows[:, :6].min(1)[0] > rows[:, 9:].max(1)[0]).all()
    assert (columns[:, 10:].min(1)[0] > columns[:, :7].max(1)[0]).all()
    late = order.ranks >= 128  # among themselves in any order
    shuffled = torch.where(late, order.scores.flip(0) - 10, order.scores)
    for one, other in zip(zoom_densities(Order(shuffled, (16, 16)), 0.4), (rows, columns)):
        assert torch.allclose(one, other, atol=1e-6)
    for even in zoom_densities(order, 1.0):
        assert torch.equal(even, torch.ones(2, 16))


def test_tokens_are_those_of_a_slow_reference():
    model = collapse(vit(), "bayer", keep=30, remainder="zoom", area_bias=0.5)
    images, order = torch.randn(2, 3, 64, 64), corner_order()
    selection = model.select(images, order)
    densities = zoom_densities(order, 0.5)
    h, w = 6, 5
    edges = [axis_edges(density, cells) for density, cells in zip(densities, (h, w))]
    small = resample_axes(images, densities, (4 * h, 4 * w))
    tokens = model.patch_embed.proj(small).flatten(2).mT
    positions = model.pos_embed[0, 1:].unflatten(0, (16, 16))
    cover = selection.cover()
    for image in range(2):
        rows, columns = (edge[image].tolist() for edge in edges)
        for cell in range(h * w):
            top, bottom, left, right = *rows[cell // w : cell // w + 2], *columns[cell % w : cell % w + 2]
            area, added, inside = (bottom - top) * (right - left), torch.zeros(32), set()
            for i in range(16):
                for j in range(16):
                    share = max(0, min(bottom, i + 1) - max(top, i)) * max(0, min(right, j + 1) - max(left, j))
                    added += share / area * positions[i, j]
                    if top < i + 0.5 < bottom and left < j + 0.5 < right:
                        inside.add(16 * i + j)
            assert torch.allclose(selection.extra[image, cell], tokens[image, cell] + added, atol=1e-4)
            assert selection.areas[image, cell].item() == pytest.approx(area, rel=1e-4)
            assert set((cover[image] == cell).nonzero()[:, 0].tolist()) == inside
            place = selection.places[image, cell].item()
            assert (place // 16, place % 16) == (int((top + bottom) / 2), int((left + right) / 2))
    assert selection.kept.shape == (2, 0) and torch.allclose(selection.areas.sum(1), torch.full((2,), 256.0))
    assert torch.allclose(selection.key_bias[:, 0, 0, 1:], 0.5 * selection.areas.log())
    assert not torch.allclose(selection.areas[0], selection.areas[0].mean().expand(30), rtol=0.2)


def test_parts_and_pairs():
    edges = torch.tensor([[0.0, 0.5, 2.6, 4.0]])
    assert places_of_intervals(edges).tolist() == [[0, 1, 3]]
    assert interval_of_parts(edges, 4).tolist() == [[1, 1, 1, 2]]
    assert pairs_of(torch.tensor([[1, 2]]), torch.tensor([[0, 3]]), 5).tolist() == [[5, 8, 10, 13]]
    assert interval_shares(edges, 4)[0, 1].tolist() == pytest.approx([0.5 / 2.1, 1 / 2.1, 0.6 / 2.1, 0])
    values, axes = torch.randn(2, 12, 3), (torch.randn(2, 5, 3), torch.randn(2, 2, 4))
    expected = torch.einsum("nah,nbw,nhwd->nabd", *axes, values.unflatten(1, (3, 4))).flatten(1, 2)
    assert torch.allclose(weighted_axes(values, (3, 4), axes), expected, atol=1e-5)


@torch.no_grad()
def test_evenly_it_is_the_downscaled_image_and_asks_for_no_order():
    model, images = collapse(vit(), "bayer", keep=64, remainder="zoom", coarse_share=1.0), torch.randn(2, 3, 64, 64)
    model.orderer.forward = None
    found = model.forward_features(images)
    model.remainder = "coarse"
    assert torch.equal(model.forward_features(images), found)
    nearly = collapse(vit(), "bayer", keep=64, remainder="zoom", coarse_share=0.9999)
    assert torch.allclose(nearly.forward_features(images, order=corner_order()), found, atol=1e-2)
    nearly.coarse_share = 0.5
    assert not torch.allclose(nearly.forward_features(images, order=corner_order()), found, atol=1e-1)


@torch.no_grad()
def test_each_image_has_its_own_zoom():
    model, images = collapse(vit(), "bayer", keep=40, remainder="zoom", area_bias=0.5), torch.randn(2, 3, 64, 64)
    order = Order(torch.rand(2, 256), (16, 16))
    both = model(images, order=order)
    for i in range(2):
        assert torch.allclose(model(images[i : i + 1], order=order[i : i + 1]), both[i : i + 1], atol=1e-4)
    order = model.compute_order(images, upto=model.plan(40, (16, 16)).places)
    assert torch.equal(model(images), model(images, order=order))


@torch.no_grad()
def test_the_head_called_by_itself_cannot_know_the_areas():
    model = collapse(vit(global_pool="avg"), "bayer", keep=20, remainder="zoom", area_bias=0.5)
    images = torch.randn(2, 3, 64, 64)
    features = model.forward_features(images)
    with pytest.raises(CollapseError, match="area_bias must be 0.*areas, which differ"):
        model.forward_head(features)
    model.area_bias = 0
    assert torch.equal(model.forward_head(model.forward_features(images)), model(images))


@pytest.mark.parametrize("name", ["SiglipVisionModel", "DINOv3ViTModel", "ViTModel"])
@torch.no_grad()
def test_transformers_count_the_areas_of_each_image(name):
    config = getattr(transformers, name.partition("Model")[0].removesuffix("Vision") + "Config")
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    shape |= {"image_size": 64, "patch_size": 8}
    text = {"vision_config": shape, "text_config": {**shape, "vocab_size": 99}} if "Siglip" in name else shape
    config = config(**text)
    model = getattr(transformers, name)(getattr(config, "vision_config", config)).eval()
    collapse(model, "bayer", keep=20, remainder="zoom", area_bias=0.7)
    images, order = torch.randn(2, 3, 64, 64), corner_order((8, 8), (slice(0, 3), slice(5, 8)))
    order = Order(torch.stack([order.scores[0], order.reversed().scores[0]]), (8, 8))  # other areas in each image
    both = model(images, order=order)
    for i in range(2):
        alone = model(images[i : i + 1], order=order[i : i + 1])
        assert torch.allclose(alone.last_hidden_state, both.last_hidden_state[i : i + 1], atol=1e-4)
        assert torch.allclose(alone.pooler_output, both.pooler_output[i : i + 1], atol=1e-4)
    model.area_bias = 0
    assert not torch.allclose(model(images, order=order).pooler_output, both.pooler_output, atol=1e-4)


def test_gradients_reach_the_densities():
    density = torch.rand(1, 8).add(0.5).requires_grad_()
    images = F.interpolate(torch.randn(1, 3, 8, 8), (64, 64), mode="bilinear")
    resample_axes(images, (density, density), (24, 24)).square().sum().backward()
    assert density.grad.isfinite().all() and density.grad.abs().max() > 0
