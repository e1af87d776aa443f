"""`collapse` itself: what a collapsed model stays, what it refuses, and the parts that drop tokens."""

import copy
import io
import logging
import pickle

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models._features import FeatureGetterNet
from timm.utils import ModelEmaV3
from torch import nn

from timm_collapse import CollapseError, CollapseOrder, Order, collapse
from timm_collapse.models import Collapsed
from timm_collapse.models.ranker import Ranker
from timm_collapse.models.selection import (
    Selection,
    cell_centres,
    cell_weights,
    coarse_grid,
    sparse_patch_embed,
)

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
    assert collapse(model, orderer()) is model
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
    model = collapse(vit(), orderer())
    state = vit().state_dict()
    keys = list(state)
    model.load_state_dict(state)
    assert list(state) == keys


def test_collapsing_again_changes_the_orderer_and_still_embeds_only_kept_patches():
    model = collapse(vit(), "raster", keep=0.25)
    assert model.compute_order(IMAGES).keep(4).tolist() == [[0, 1, 2, 3]] * 2
    collapse(model, "centre", keep=0.5)
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
        assert other.patch_drop.selection is other.selection is other.patch_embed.selection is not model.selection
        other.keep = 1
    assert model.keep == 0.3 and torch.equal(model(IMAGES), logits)


def test_average_of_weights_leaves_the_orderer_alone():
    model = collapse(vit(), orderer(), keep=0.5)
    ema = ModelEmaV3(model, decay=0.5)
    before = copy.deepcopy(ema.module.orderer.state_dict())
    with torch.no_grad():
        model.head.weight += 1
    ema.update(model)
    assert torch.allclose(ema.module.head.weight, model.head.weight - 0.5)
    assert all(torch.equal(before[key], value) for key, value in ema.module.orderer.state_dict().items())
    assert ema.module(IMAGES).shape == (2, 5)


def test_the_orderer_stays_frozen_and_in_eval_mode():
    model = collapse(vit(), orderer(), keep=0.5).train()
    assert model.training and not any(m.training for m in model.orderer.modules())
    model.requires_grad_(True)
    assert not any(p.requires_grad for p in model.orderer.parameters()) and model.head.weight.requires_grad
    model(IMAGES).sum().backward()
    assert all(p.grad is None for p in model.orderer.parameters()) and model.head.weight.grad is not None
    optimizer = timm.optim.create_optimizer_v2(model, "adamw", lr=0.1, layer_decay=0.9)
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for name, p in model.named_parameters() if not name.startswith("orderer.")}


def test_reset_classifier_and_features():
    model = collapse(vit(), "bayer", keep=0.5)
    model.reset_classifier(7, "avg")
    order = order_of()
    features = model.forward_features(IMAGES, order=order)
    assert model(IMAGES, order=order).shape == (2, 7)
    assert torch.allclose(model.forward_head(features, pre_logits=True), model.fc_norm(features[:, 1:].mean(1)))
    net = FeatureGetterNet(collapse(vit(), "raster", keep=0.25), out_indices=(0, 1))
    maps = net(IMAGES)
    assert [tuple(m.shape) for m in maps] == [(2, 32, 4, 4)] * 2
    assert all((m[:, :, 0] != 0).all() and (m[:, :, 1:] == 0).all() for m in maps)


def test_prefix_tokens_come_with_the_intermediates():
    model, order = collapse(vit("vit_small_patch14_reg4_dinov2", img_size=56), "bayer", keep=0.25), order_of()
    images = torch.randn(2, 3, 56, 56)
    features, entries = model.forward_intermediates(images, norm=True, return_prefix_tokens=True, order=order)
    spatial, prefix = entries[-1]
    assert spatial.shape == (2, 32, 4, 4) and torch.allclose(prefix, features[:, :5], atol=1e-6)


# -- keep, order and the budget


def test_keep_may_change_at_any_time_and_may_be_a_count():
    model = collapse(vit(), "bayer", keep=0.25)
    for keep, count in ((0.25, 4), (5, 5), (0.5, 8), (1, 16), (16, 16), (1.0, 16), (2, 2), (0.01, 1)):
        model.keep = keep
        assert model.forward_features(IMAGES).shape[1] == 1 + count
    model.keep = 17
    with pytest.raises(CollapseError, match="keep"):
        model(IMAGES)


def test_the_order_is_the_orderers_or_the_given_one():
    model = collapse(vit(), orderer(), keep=0.25, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
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
        embed, selection = timm.layers.PatchEmbed(size, 8, 3, 16, norm_layer=nn.LayerNorm, **kwargs), Selection()
        images = torch.randn(2, 3, *size)
        dense = embed(images).reshape(2, 24, 16)
        assert sparse_patch_embed(embed, selection)
        assert torch.equal(embed(images).reshape(2, 24, 16), dense)
        selection.kept = torch.stack([torch.randperm(24)[:7].sort().values for _ in range(2)])
        sparse, index = embed(images).reshape(2, 24, 16), selection.kept.unsqueeze(-1).expand(-1, -1, 16)
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
        (2, 3),
        (3, 3),
        (4, 4),
        (4, 5),
    ]
    assert coarse_grid(8, (4, 8)) == (2, 4) and coarse_grid(500, (3, 5)) == (3, 5)
    for budget in range(1, 40):
        h, w = coarse_grid(budget, (9, 13))
        assert h * w <= budget and (h * w == 1 or max(9 * w / (13 * h), 13 * h / (9 * w)) <= 1.5)


@pytest.mark.parametrize("grid, cells", [((4, 4), (2, 2)), ((5, 7), (2, 3)), ((14, 14), (4, 5)), ((3, 3), (3, 3))])
def test_cell_weights_are_areas(grid, cells):
    weights = cell_weights(grid, cells)
    assert weights.shape == (cells[0] * cells[1], grid[0] * grid[1])
    assert torch.allclose(weights.sum(1), torch.ones(len(weights)))
    scale = (cells[0] * 1, cells[1] * 1)  # every patch cut into as many parts as there are cells: areas become counts
    values = torch.randn(1, 1, *grid)
    fine = values.repeat_interleave(scale[0], 2).repeat_interleave(scale[1], 3)
    assert torch.allclose(weights @ values.flatten(), F.adaptive_avg_pool2d(fine, cells).flatten(), atol=1e-5)
    if grid[0] % cells[0] == grid[1] % cells[1] == 0:
        assert torch.allclose(weights @ values.flatten(), F.adaptive_avg_pool2d(values, cells).flatten(), atol=1e-6)
    assert (weights[range(len(weights)), cell_centres(grid, cells)[0]] > 0).all()


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "naflexvit_base_patch16_gap", "cait_xxs24_224"])
def test_fused_token_is_the_mean_of_the_dropped_tokens(name):
    kwargs = {k: v for k, v in TINY.items() if k != "img_size" or "naflex" not in name}
    model = timm.create_model(name, **kwargs).eval()
    nn.init.normal_(model.embeds.pos_embed if "naflex" in name else model.pos_embed)
    collapse(model, "bayer", keep=6, remainder="fused")
    tokens = model._embed_patches(IMAGES) + model._patch_positions((4, 4))
    order = order_of()
    model._select(IMAGES, order)
    for i, kept in enumerate(order.keep(5).tolist()):
        dropped = [n for n in range(16) if n not in kept]
        assert torch.allclose(
            model.selection.extra[i, 0], torch.stack([tokens[i, n] for n in dropped]).mean(0), atol=1e-5
        )
    assert model.selection.places.tolist() == [[10]]


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "beit_base_patch16_224"])
def test_coarse_tokens_embed_the_downscaled_image_with_mean_positions(name):
    model = vit(name, **({"use_abs_pos_emb": True} if "beit" in name else {}))
    nn.init.normal_(model.pos_embed)
    collapse(model, "bayer", keep=8, remainder="coarse")
    small = F.interpolate(IMAGES, (32, 32), mode="bicubic", antialias=True)
    embedded = model.patch_embed.proj(small).flatten(2).mT
    positions = F.avg_pool2d(model.pos_embed[:, 1:].mT.reshape(1, -1, 4, 4), 2).flatten(2).mT
    model._select(IMAGES, order_of())
    assert model.selection.kept.shape == (2, 4) and model.selection.extra.shape == (2, 4, 32)
    assert torch.allclose(model.selection.extra, embedded + positions, atol=1e-5)


# -- refusals


def test_models_that_cannot_drop_tokens_are_refused_with_the_reason():
    cases = {
        "resnet10t": "convolution",
        "swin_tiny_patch4_window7_224": "windows",
        "mixer_s32_224": "mixing layers",
        "samvit_base_patch16_224": "relative positions",
        "hiera_tiny_224": "windows",
        "xcit_nano_12_p16_224": "local patch interaction",
        "convit_tiny": "gated attention",
        "vit_relpos_small_patch16_224": "relative position bias",
    }
    for name, reason in cases.items():
        with torch.device("meta"):
            model = timm.create_model(name)
        with pytest.raises(CollapseError, match=f"cannot be collapsed: .*{reason}.*supported are VisionTransformer"):
            collapse(model, "bayer")
        assert not isinstance(model, Collapsed)
    with pytest.raises(CollapseError, match="Linear.*no known place"):
        collapse(nn.Linear(2, 2), "bayer")
    with pytest.raises(CollapseError, match="it wraps a model"):
        collapse(FeatureGetterNet(vit()), "bayer")
    with pytest.raises(CollapseError, match="patch_drop_rate must be 0, got 0.5"):
        collapse(vit(patch_drop_rate=0.5), "bayer")


class Renamed(timm.models.VisionTransformer):
    def extra(self):
        return "nothing that collapse relies on"


class Rearranged(timm.models.VisionTransformer):
    def forward_features(self, x):
        return super().forward_features(x).flip(1)


def test_subclasses_are_taken_unless_they_change_where_tokens_are():
    kwargs = {**TINY, "patch_size": 16}
    model = collapse(Renamed(**kwargs).eval(), "bayer", keep=0.25)
    assert isinstance(model, Renamed) and model.forward_features(IMAGES).shape == (2, 5, 32)
    with pytest.raises(CollapseError, match="Rearranged.*overrides VisionTransformer.forward_features"):
        collapse(Rearranged(**kwargs), "bayer")
    patched = vit()
    patched.forward = lambda x: x
    with pytest.raises(CollapseError, match="forward"):
        collapse(patched, "bayer")


def test_convolutional_stems_warn_and_take_no_remainder():
    def hybrid():
        return timm.create_model("vit_tiny_r_s16_p8_224", embed_dim=32, depth=1, num_heads=2, img_size=64).eval()

    model = hybrid()
    with pytest.warns(UserWarning, match="convolutional stem"):
        collapse(model, "bayer", keep=2)
    assert model.forward_features(IMAGES).shape[1] == 3
    with pytest.raises(CollapseError, match="remainder must be none"):
        model.remainder = "fused"
    plain = hybrid()
    keys = list(plain.state_dict())
    with pytest.warns(UserWarning), pytest.raises(CollapseError, match="remainder must be none"):
        collapse(plain, "bayer", remainder="coarse")
    assert not isinstance(plain, Collapsed) and list(plain.state_dict()) == keys


@pytest.mark.parametrize("keep", [0, 1.5, -1, True, "a", float("nan"), None, 0.0, -0.5])
def test_wrong_keep(keep):
    with pytest.raises(CollapseError, match="keep must be a ratio"):
        collapse(vit(), "bayer", keep=keep)
    model = collapse(vit(), "bayer", keep=0.5)
    with pytest.raises(CollapseError, match="keep must be a ratio"):
        model.keep = keep
    assert model.keep == 0.5


def test_wrong_arguments_name_what_was_given():
    model = collapse(vit(), "bayer", keep=0.5)
    cases = [
        (lambda: collapse("vit", "bayer"), "model must be"),
        (lambda: collapse(vit(), nn.Linear(2, 2)), "orderer must be a CollapseOrder"),
        (lambda: collapse(vit(), None), "orderer must be"),
        (lambda: collapse(vit(), "no_such_orderer"), "no_such_orderer"),
        (
            lambda: collapse(vit(), "bayer", remainder="mean"),
            "remainder must be one of none, fused, coarse, got 'mean'",
        ),
        (lambda: setattr(model, "remainder", "mean"), "remainder"),
        (lambda: collapse(vit(), "bayer", coarse_share=0), "coarse_share"),
        (lambda: collapse(vit(), "bayer", coarse_share=1.1), "coarse_share"),
        (lambda: collapse(vit(), "bayer", coarse_share="a"), "coarse_share"),
        (lambda: model(IMAGES, order=Order(torch.rand(2, 64), (8, 8))), r"order must be on the model's grid \(4, 4\)"),
        (lambda: model(IMAGES, order=order_of(3)), "order must be of the 2 images"),
        (lambda: model(IMAGES, order=torch.rand(2, 16)), "order must be an Order"),
        (lambda: model(IMAGES, attn_mask=torch.zeros(17, 17)), "attn_mask must be None"),
        (lambda: model.forward_features(IMAGES, torch.zeros(17, 17)), "attn_mask must be None"),
        (lambda: model.forward_intermediates(IMAGES, attn_mask=torch.zeros(17, 17)), "attn_mask must be None"),
        (lambda: model(IMAGES, is_causal=True), "is_causal must be False"),
        (lambda: model(torch.randn(2, 3, 32, 64)), r"images must be \(64, 64\) pixels"),
        (lambda: model(torch.randn(3, 64, 64)), "images must be"),
        (lambda: model.forward_intermediates(IMAGES, output_fmt="NHWC"), "output_fmt"),
        (lambda: model.forward_intermediates(IMAGES, output_dict=True), "output_dict"),
        (lambda: model._replicate_for_data_parallel(), "DataParallel"),
    ]
    for call, message in cases:
        with pytest.raises(CollapseError, match=message):
            call()
    assert model.selection.kept is None and model(IMAGES).shape == (2, 5)  # as before
    dynamic = collapse(vit(dynamic_img_size=True), "bayer", keep=0.5)
    with pytest.raises(CollapseError, match="multiples"):
        dynamic(torch.randn(1, 3, 60, 64))


# -- other ways to run


def test_compile_export_and_trace_give_the_same_logits():
    for model in (
        collapse(vit(), "bayer", keep=0.3, remainder="coarse"),
        collapse(vit("beit_base_patch16_224"), orderer(), keep=0.3),
        collapse(vit("eva02_tiny_patch14_224", img_size=56), orderer(), keep=0.3),
    ):
        images = F.interpolate(IMAGES, model.patch_embed.img_size)
        with torch.no_grad():
            logits = model(images)
            assert torch.allclose(torch.compile(model, fullgraph=True, backend="aot_eager")(images), logits, atol=1e-5)
            assert torch.allclose(torch.export.export(model, (images,)).module()(images), logits, atol=1e-5)
            assert torch.allclose(torch.jit.trace(model, (images,))(images), logits, atol=1e-5)
        torch._dynamo.reset()


@pytest.mark.parametrize("name", ["bayer", "collapse_ranker_tiny"])
def test_onnx_gives_the_same_logits(name, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    logging.getLogger("onnxscript").setLevel(logging.ERROR)
    model = collapse(vit(), CollapseOrder.named(name), keep=4, remainder="fused")
    isinstance(model.orderer.model, Ranker) and model(IMAGES)  # its caches are filled outside of the export
    program = torch.onnx.export(model, (IMAGES,), dynamo=True, verbose=False)
    program.save(tmp_path / "model.onnx")
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    (logits,) = session.run(None, {session.get_inputs()[0].name: IMAGES.numpy()})
    assert torch.allclose(torch.from_numpy(logits), model(IMAGES), atol=1e-5)
