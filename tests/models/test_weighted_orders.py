"""Orders by weighted uncertainty."""

import pytest
import timm
import torch
from sklearn.datasets import load_sample_images

from timm_collapse import CollapseError, CollapseOrder, collapse
from timm_collapse.models.normalisation import Normalisation


def ranker(cell=1):
    model = timm.create_model(
        "collapse_ranker_tiny", img_size=32, patch_size=4, dim=32, depth=1, rank=8, phases=(0.0, 0.25, 0.5), cell=cell
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return CollapseOrder(model)


@pytest.fixture
def images():
    return torch.randn(4, 3, 32, 32)


@pytest.mark.parametrize("grid", [(8, 8), (16, 12), (4, 4)])
@pytest.mark.parametrize("cell", [1, 2])
def test_equal_weights_change_nothing_bit_for_bit(images, cell, grid):
    orderer = ranker(cell)
    plain = orderer(images, grid=grid)
    for weights in (torch.ones(4, grid[0] * grid[1]), torch.full((4, 32, 32), 0.3), torch.ones(4, 1, 1, dtype=bool)):
        assert torch.equal(orderer(images, grid=grid, weights=weights).indices, plain.indices)
    upto = grid[0] * grid[1] // 4
    part = orderer(images, grid=grid, upto=upto, weights=torch.ones(4, 5, 3))
    assert torch.equal(part.indices[:, :upto], plain.indices[:, :upto])


@pytest.mark.parametrize("cell", [1, 2])
def test_what_is_asked_for_comes_earlier_and_the_rest_behind(images, cell):
    orderer, left = ranker(cell), torch.zeros(4, 8, 8)
    left[..., :4] = 1
    ranks = [orderer(images, weights=w).ranks.view(4, 8, 8)[..., :4].float().mean() for w in (None, left, 1 - left)]
    assert ranks[1] < ranks[0] - 5 and ranks[0] < ranks[2] - 5
    mask = left.repeat_interleave(4, 1).repeat_interleave(4, 2).bool()  # of the pixels
    assert torch.equal(orderer(images, weights=mask).indices, orderer(images, weights=left.flatten(1)).indices)
    assert torch.equal(orderer(images, weights=5 * left).indices, orderer(images, weights=left).indices)


def test_on_photos_most_of_what_is_kept_is_where_the_weights_are():
    orderer = CollapseOrder.from_pretrained("collapse_ranker_tiny_224")
    photos = torch.stack([torch.from_numpy(photo.copy()) for photo in load_sample_images().images]).permute(0, 3, 1, 2)
    images = Normalisation.of(orderer).apply(photos / 255)
    left = torch.tensor([[1.0, 0.2]]).expand(2, 1, 2)
    kept = torch.stack([orderer(images, upto=43, weights=weights).first(43) for weights in (None, left)])
    before, after = (kept % 14 < 7).float().mean(-1)
    assert (before < 0.7).all() and (after > 0.8).all()


@pytest.mark.parametrize("name", ["variance", "centre_variance", "gradient"])
def test_baselines_of_content_are_multiplied(images, name):
    orderer, weights = CollapseOrder.baseline(name), torch.rand(4, 16)
    expected = orderer(images, (4, 4)).scores * (weights / weights.amax(1, keepdim=True))
    assert torch.equal(orderer(images, (4, 4), weights=weights).scores, expected)
    assert torch.equal(orderer(images, (4, 4), weights=torch.ones(4, 16)).scores, orderer(images, (4, 4)).scores)


@torch.no_grad()
def test_the_order_of_a_collapsed_model_takes_them_too(images):
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=1).eval()
    model, weights = collapse(vit, "variance", keep=0.5), torch.rand(4, 16)
    order = model.compute_order(images, weights=weights)
    assert torch.equal(order.indices, (model.compute_order(images).scores * weights).argsort(1, descending=True))
    assert torch.isfinite(model(images, order=order)).all()


@pytest.mark.parametrize("name", ["random", "bayer"])
def test_an_order_that_knows_no_uncertainty_refuses_them(images, name):
    with pytest.raises(CollapseError, match=f"weights must be None for {name}, which knows no uncertainty"):
        CollapseOrder.baseline(name)(images, (4, 4), weights=torch.ones(4, 16))
    with pytest.raises(CollapseError, match="weights must be of shape"):
        ranker()(images, weights=torch.ones(4, 16))
    comae = timm.create_model("comae_tiny", img_size=32, dim=32, depth=1, decoder_dim=32, decoder_depth=1)
    with pytest.raises(CollapseError, match="weights must be None for CoMAE"):
        CollapseOrder(comae, refine=0.2)(images, weights=torch.ones(4, 16))
