"""`collapse` itself: what a collapsed model stays, what it refuses, and the parts that drop tokens."""

import copy
import io
import pickle

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models._features import FeatureGetterNet
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import nn

from timm_collapse import CollapseError, CollapseOrder, Order, collapse
from timm_collapse.collapse.base import Collapsed
from timm_collapse.collapse.cells import cell_centres, cell_of_patches, coarse_grid, mean_of_cells
from timm_collapse.collapse.selection import Carrier, Selection, sparse_patch_embed

TINY = {"img_size": 64, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
RANKER = {"img_size": 16, "patch_size": 4, "dim": 32, "depth": 1, "rank": 8, "phases": (0.0, 0.25)}


def vit(name="vit_tiny_patch16_224", **kwargs):
    return timm.create_model(name, **{**TINY, **kwargs}).eval()


def orderer() -> CollapseOrder:
    """One with parameters."""
    return CollapseOrder(timm.create_model("collapse_ranker_tiny", **RANKER))


def order_of(batch=2):
    return Order(torch.rand(batch, 16), (4, 4))


IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


# -- it stays the model it was


def test_collapse_is_in_place_and_plain_checkpoints_load():
    plain, model = vit(), vit()
    state = plain.state_dict()
    assert collapse(model, orderer(), remainder="none") is model
    assert isinstance(model, (type(plain), Collapsed)) and type(model).__name__ == "CollapsedVisionTransformer"
    assert list(model.state_dict()) == list(state)
    assert not any("orderer" in key for key in model.state_dict())
    assert model.load_state_dict(state) == ([], [])
    model.keep = 1
    assert torch.equal(model(IMAGES), plain(IMAGES))
    state["unknown"] = torch.zeros(1)
    with pytest.raises(RuntimeError, match="unknown"):
        model.load_state_dict(state)


def test_loading_does_not_change_the_given_state_dict():
    model = collapse(vit(), orderer(), remainder="none")
    state = vit().state_dict()
    keys = list(state)
    model.load_state_dict(state)
    assert list(state) == keys


def test_collapsing_again_changes_the_orderer_and_still_embeds_only_kept_patches():
    model = collapse(vit(), "raster", keep=0.25, remainder="none")
    assert model.compute_order(IMAGES).keep(4).tolist() == [[0, 1, 2, 3]] * 2
    collapse(model, "centre", keep=0.5, remainder="none")
    assert model.compute_order(IMAGES).keep(4).tolist() == [[5, 6, 9, 10]] * 2
    seen = []
    model.patch_embed.register_forward_hook(lambda module, args, out: seen.append((out != 0).any(-1).sum(1)))
    model(IMAGES)
    assert seen[0].tolist() == [8, 8]


def test_copies_and_pickles_give_the_same_logits_and_are_independent():
    model = collapse(vit(), orderer(), keep=0.3, remainder="coarse")
    logits = model(IMAGES)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)]
    for other in copies:
        assert type(other) is type(model) and torch.equal(other(IMAGES), logits)
        assert other.carrier is other.patch_embed.carrier is not model.carrier
        other.keep = 1
    assert model.keep == 0.3 and torch.equal(model(IMAGES), logits)


def test_average_of_weights_leaves_the_orderer_alone():
    model = collapse(vit(), orderer(), keep=0.5, remainder="none")
    ema = ModelEmaV3(model, decay=0.5)
    before = copy.deepcopy(ema.module.orderer.state_dict())
    with torch.no_grad():
        model.head.weight += 1
    ema.update(model)
    assert torch.allclose(ema.module.head.weight, model.head.weight - 0.5)
    assert all(torch.equal(before[key], value) for key, value in ema.module.orderer.state_dict().items())
    assert ema.module(IMAGES).shape == (2, 5)


def test_the_orderer_stays_frozen_and_in_eval_mode():
    model = collapse(vit(), orderer(), keep=0.5, remainder="none").train()
    assert model.training and not any(m.training for m in model.orderer.modules())
    model.requires_grad_(True)
    assert not any(p.requires_grad for p in model.orderer.parameters()) and model.head.weight.requires_grad
    model(IMAGES).sum().backward()
    assert all(p.grad is None for p in model.orderer.parameters()) and model.head.weight.grad is not None
    optimizer = create_optimizer_v2(model, "adamw", lr=0.1, layer_decay=0.9)
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for name, p in model.named_parameters() if not name.startswith("orderer.")}


def test_reset_classifier_and_features():
    model = collapse(vit(), "bayer", keep=0.5, remainder="none")
    model.reset_classifier(7, "avg")
    order = order_of()
    features = model.forward_features(IMAGES, order=order)
    assert model(IMAGES, order=order).shape == (2, 7)
    assert torch.allclose(model.forward_head(features, pre_logits=True), model.fc_norm(features[:, 1:].mean(1)))
    net = FeatureGetterNet(collapse(vit(), "raster", keep=0.25, remainder="none"), out_indices=(0, 1))
    maps = net(IMAGES)
    assert [tuple(m.shape) for m in maps] == [(2, 32, 4, 4)] * 2
    assert all((m[:, :, 0] != 0).all() and (m[:, :, 1:] == 0).all() for m in maps)


def test_prefix_tokens_come_with_the_intermediates():
    model, order = (
        collapse(vit("vit_small_patch14_reg4_dinov2", img_size=56), "bayer", keep=0.25, remainder="none"),
        order_of(),
    )
    images = torch.randn(2, 3, 56, 56)
    features, entries = model.forward_intermediates(images, norm=True, return_prefix_tokens=True, order=order)
    spatial, prefix = entries[-1]
    assert spatial.shape == (2, 32, 4, 4) and torch.allclose(prefix, features[:, :5], atol=1e-6)


# -- keep, order and the budget


def test_keep_may_change_at_any_time_and_may_be_a_count():
    model = collapse(vit(), "bayer", keep=0.25, remainder="none")
    for keep, count in ((0.25, 4), (5, 5), (0.5, 8), (1, 16), (16, 16), (1.0, 16), (2, 2), (0.01, 1)):
        model.keep = keep
        assert model.forward_features(IMAGES).shape[1] == 1 + count
    model.keep = 17
    with pytest.raises(CollapseError, match="keep"):
        model(IMAGES)


def test_the_order_is_the_orderers_or_the_given_one():
    model = collapse(vit(), orderer(), keep=0.25, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7), remainder="none")
    images = IMAGES * torch.tensor([0.5, 0.6, 0.7]).view(3, 1, 1) + torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)
    own, scale = model.orderer, [torch.tensor(t).view(3, 1, 1) for t in (model.orderer.mean, model.orderer.std)]
    order = own((images - scale[0]) / scale[1], grid=(4, 4), upto=4)
    assert torch.equal(model.compute_order(IMAGES, upto=4).indices, order.indices)
    assert torch.equal(model(IMAGES), model(IMAGES, order=order))
    assert not torch.equal(model(IMAGES), model(IMAGES, order=order.reversed()))


@pytest.mark.parametrize("remainder", ["none", "fused", "coarse"])
@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_tokens_never_exceed_the_budget(remainder, share):
    model = collapse(vit(img_size=(80, 112)), "bayer", remainder=remainder, coarse_share=share)
    images = torch.randn(1, 3, 80, 112)
    for keep in (2, 3, 5, 8, 13, 21, 34, 0.02, 0.1, 0.3, 0.7, 0.99):
        model.keep = keep
        budget = keep if keep >= 2 else max(1, round(keep * 35))
        tokens = model.forward_features(images).shape[1] - 1
        assert tokens <= budget
        if remainder != "coarse" or share < 1:
            assert tokens == budget


# -- the parts


def test_sparse_embedding_equals_the_dense_one_at_kept_patches():
    for size, kwargs in (((32, 48), {}), ((37, 50), {}), ((32, 48), {"flatten": False, "output_fmt": "NHWC"})):
        embed, carrier = timm.layers.PatchEmbed(size, 8, 3, 16, norm_layer=nn.LayerNorm, **kwargs), Carrier()
        images = torch.randn(2, 3, *size)
        dense = embed(images).reshape(2, 24, 16)
        assert sparse_patch_embed(embed, carrier)
        assert torch.equal(embed(images).reshape(2, 24, 16), dense)
        kept = torch.stack([torch.randperm(24)[:7].sort().values for _ in range(2)])
        sparse = carrier.run(Selection(kept, (4, 6)), embed, images).reshape(2, 24, 16)
        index = kept.unsqueeze(-1).expand(-1, -1, 16)
        assert torch.allclose(sparse.gather(1, index), dense.gather(1, index), atol=1e-6)
        assert (sparse.scatter(1, index, 0.0) == 0).all()


def test_an_image_that_is_no_multiple_of_the_patch_is_cropped_as_timm_does():
    model = vit("vit_tiny_patch16_224", img_size=72)  # a grid of 4 x 4 and 8 pixels over
    images, order = torch.randn(2, 3, 72, 72), order_of()
    dense = copy.deepcopy(model)
    dense.patch_drop = nn.Identity()
    for remainder in ("none", "fused", "coarse"):
        collapse(model, "variance", keep=0.5, remainder=remainder)
        edge = images.clone()
        edge[..., 64:] = 9
        assert torch.equal(model(images, order=order), model(edge, order=order))
        assert torch.equal(model(images), model(edge))
    assert torch.allclose(model.patch_embed(images), dense.patch_embed(images))


def test_coarse_grid_closed_forms():
    assert coarse_grid(0, (14, 14)) is None
    assert [coarse_grid(n, (14, 14)) for n in (1, 2, 4, 6, 9, 16, 21)] == [
        (1, 1),
        (1, 1),
        (2, 2),
        (3, 2),
        (3, 3),
        (4, 4),
        (5, 4),
    ]
    assert coarse_grid(8, (4, 8)) == (2, 4) and coarse_grid(500, (3, 5)) == (3, 5)
    for budget in range(1, 40):
        h, w = coarse_grid(budget, (9, 13))
        assert h * w <= budget and (h * w == 1 or max(9 * w / (13 * h), 13 * h / (9 * w)) <= 1.5)


@pytest.mark.parametrize("grid, cells", [((4, 4), (2, 2)), ((5, 7), (2, 3)), ((14, 14), (4, 5)), ((3, 3), (3, 3))])
def test_means_of_cells_are_by_area(grid, cells):
    values = torch.randn(2, 3, *grid)
    # every patch cut into as many parts as there are cells: areas become counts
    fine = values.repeat_interleave(cells[0], 2).repeat_interleave(cells[1], 3)
    means = mean_of_cells(values.flatten(2).mT, grid, cells)
    assert torch.allclose(means, F.adaptive_avg_pool2d(fine, cells).flatten(2).mT, atol=1e-5)
    if grid[0] % cells[0] == grid[1] % cells[1] == 0:
        assert torch.allclose(means, F.adaptive_avg_pool2d(values, cells).flatten(2).mT, atol=1e-6)
    centres, cover = cell_centres(grid, cells)[0], cell_of_patches(grid, cells)[0]
    assert cover.shape == (grid[0] * grid[1],) and cover[centres].tolist() == list(range(cells[0] * cells[1]))


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "naflexvit_base_patch16_gap", "cait_xxs24_224"])
def test_fused_token_is_the_mean_of_the_dropped_tokens(name):
    kwargs = {k: v for k, v in TINY.items() if k != "img_size" or "naflex" not in name}
    model = timm.create_model(name, **kwargs).eval()
    nn.init.normal_(model.embeds.pos_embed if "naflex" in name else model.pos_embed)
    collapse(model, "bayer", keep=6, remainder="fused")
    tokens = model._embed_patches(IMAGES) + model._patch_positions((4, 4))
    order = order_of()
    selection = model.select(IMAGES, order)
    for i, kept in enumerate(order.keep(5).tolist()):
        dropped = [n for n in range(16) if n not in kept]
        assert torch.allclose(selection.extra[i, 0], torch.stack([tokens[i, n] for n in dropped]).mean(0), atol=1e-5)
    assert selection.places.tolist() == [[10]]


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "beit_base_patch16_224"])
def test_coarse_tokens_embed_the_downscaled_image_with_mean_positions(name):
    model = vit(name, **({"use_abs_pos_emb": True} if "beit" in name else {}))
    nn.init.normal_(model.pos_embed)
    collapse(model, "bayer", keep=8, remainder="coarse")
    small = F.interpolate(IMAGES, (32, 32), mode="bilinear", antialias=True)
    embedded = model.patch_embed.proj(small).flatten(2).mT
    positions = F.avg_pool2d(model.pos_embed[:, 1:].mT.reshape(1, -1, 4, 4), 2).flatten(2).mT
    selection = model.select(IMAGES, order_of())
    assert selection.kept.shape == (2, 4) and selection.extra.shape == (2, 4, 32)
    assert torch.allclose(selection.extra, embedded + positions, atol=1e-5)
