"""Images of one and of four channels, batches of none, odd sizes, and collapses that are refused."""

import pytest
import timm
import torch
import transformers

from timm_collapse import CollapseError, CollapseOrder, Order, collapse
from timm_collapse.models.normalisation import Normalisation
from timm_collapse.order import BASELINES

TINY = {"img_size": 64, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
RANKER = {"img_size": 16, "patch_size": 4, "dim": 32, "depth": 1, "rank": 8, "phases": (0.0, 0.25)}
SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
SMALL |= {"image_size": 32, "patch_size": 8}


def vit(**kwargs):
    return timm.create_model("vit_tiny_patch16_224", **{**TINY, **kwargs}).eval()


def orderer():
    return CollapseOrder(timm.create_model("collapse_ranker_tiny", **RANKER))


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("name", list(BASELINES))
def test_baselines_order_images_of_any_channels(name, channels):
    images = torch.randn(2, channels, 64, 64)
    model = collapse(vit(in_chans=channels), name, keep=0.25, remainder="none")
    assert model.forward_features(images).shape == (2, 5, 32)
    assert len(model.normalisation.mean) == channels
    if name in ("raster", "centre", "halton", "bayer"):
        expected = CollapseOrder(name)(torch.zeros(2, 3, 64, 64), grid=(4, 4))
        assert torch.equal(model.compute_order(images).indices, expected.indices)


def test_a_ranker_takes_grey_as_rgb_and_refuses_four_channels():
    own, grey = orderer(), torch.rand(2, 1, 64, 64)
    model = collapse(vit(in_chans=1), own, keep=0.25, mean=0.3, std=(0.2,), remainder="none")
    rgb = Normalisation.of(own).apply(grey.expand(-1, 3, -1, -1))
    found = model.compute_order((grey - 0.3) / 0.2)
    assert torch.equal(found.indices[:, :4], own(rgb, grid=(4, 4)).indices[:, :4])
    plain = vit(in_chans=4)
    with pytest.raises(CollapseError, match="takes RGB images, or grey ones as RGB, but .* 4 channels; baselines"):
        collapse(plain, own)
    assert type(plain) is timm.models.VisionTransformer


@pytest.mark.parametrize("own, given", [(1, 3), (3, 1)])
def test_images_of_other_channels_than_the_models_are_refused(own, given):
    model = collapse(vit(in_chans=own), "bayer", keep=0.25, remainder="none")
    with pytest.raises(CollapseError, match=f"images must have {own} channels, as the model's, got a float32 tensor"):
        model(torch.rand(2, given, 64, 64))


def test_one_value_of_a_normalisation_is_for_all_channels_and_a_wrong_number_is_refused():
    model = collapse(vit(), "bayer", mean=(0.5,), std=0.25)
    assert model.normalisation == Normalisation((0.5,) * 3, (0.25,) * 3)
    for wrong in ({"mean": (0.5, 0.5)}, {"std": (1.0,) * 4}):
        with pytest.raises(
            CollapseError, match="mean and std must be one number each, or one for each of the 3 channels"
        ):
            collapse(vit(), "bayer", **wrong)
    with pytest.raises(CollapseError, match="std must be positive"):
        collapse(vit(), "bayer", std=0.0)
    plain = vit(in_chans=1)
    grey = sum(plain.pretrained_cfg["mean"]) / 3
    assert collapse(plain, "bayer").normalisation.mean == pytest.approx((grey,))
    assert timm.create_model("cvit_tiny_patch16", in_chans=1, orderer="bayer", depth=1).normalisation.std == (0.5,)


@pytest.mark.parametrize("remainder", ["none", "fused", "coarse"])
def test_a_batch_of_no_images_is_as_in_timm(remainder):
    empty = torch.empty(0, 3, 64, 64)
    for order in ("bayer", "variance", orderer()):
        model = collapse(vit(), order, keep=0.3, remainder=remainder)
        assert model(empty).shape == vit()(empty).shape == (0, 5)
        features, maps = model.forward_intermediates(empty, indices=1)
        assert maps[0].shape == (0, 32, 4, 4) and len(features) == 0


def test_a_failed_collapse_leaves_the_model_as_it_was():
    model = collapse(vit(), "bayer", keep=0.5, remainder="coarse", coarse_share=0.25, mean=0.4, std=0.3)
    before = (model.orderer, model.keep, model.remainder, model.coarse_share, model.normalisation)
    for wrong in (
        {"keep": 0},
        {"remainder": "mean", "keep": 0.1},
        {"remainder": "fused", "coarse_share": 2},
        {"remainder": "fused", "keep": 0.1, "mean": (0.5, 0.5)},
        {"remainder": "fused", "std": -1},
    ):
        with pytest.raises(CollapseError):
            collapse(model, "raster", **wrong)
        assert before == (model.orderer, model.keep, model.remainder, model.coarse_share, model.normalisation)


def test_sizes_that_the_positions_are_not_made_for_are_refused():
    model = collapse(vit(), "bayer", keep=0.5, remainder="none")
    model.patch_embed.strict_img_size = False
    for size in ((32, 32), (64, 128), (96, 96)):
        with pytest.raises(CollapseError, match=r"patch grid of the model's positions, \(4, 4\)"):
            model(torch.randn(1, 3, *size))
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 5)


@pytest.mark.parametrize("name", ["Dinov2", "DINOv3ViT"])
def test_what_is_over_at_the_border_is_dropped_as_by_plain_transformers(name):
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**SMALL)).eval()
    images = torch.randn(2, 3, 35, 45)
    cropped, plain = images[..., :32, :40], model(images).last_hidden_state
    collapse(model, "variance", keep=1, remainder="none")
    assert torch.equal(model(images).last_hidden_state, plain)
    model.keep = 0.5
    order = Order(torch.rand(2, 20), (4, 5))
    for remainder in ("none", "coarse"):
        model.remainder = remainder
        ours = model(images, order=order).last_hidden_state
        assert ours.shape[1] == plain.shape[1] - 10
        assert torch.allclose(ours, model(cropped, order=order).last_hidden_state, atol=1e-5)
    assert torch.equal(model.compute_order(images).indices, model.compute_order(cropped).indices)


def test_dynamic_quantization_works():
    model = collapse(vit(), orderer(), keep=0.5, remainder="fused")
    images, order = torch.randn(2, 3, 64, 64), Order(torch.rand(2, 16), (4, 4))
    quantized = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    expected = model(images, order=order)
    assert (quantized(images, order=order) - expected).abs().max() < 0.1 * expected.abs().max()
    assert quantized(images).shape == (2, 5)
