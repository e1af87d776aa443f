"""What `collapse` and a collapsed model refuse, and why."""

import pytest
import timm
import torch
from timm.models._features import FeatureGetterNet
from torch import nn

from timm_collapse import CollapseError, Order, collapse
from timm_collapse.collapse.base import Collapsed

TINY = {"img_size": 64, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}


def vit(name="vit_tiny_patch16_224", **kwargs):
    return timm.create_model(name, **{**TINY, **kwargs}).eval()


def order_of(batch=2):
    return Order(torch.rand(batch, 16), (4, 4))


IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


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
        collapse(FeatureGetterNet(vit(), out_indices=(0, 1)), "bayer")
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
    model = collapse(Renamed(**kwargs).eval(), "bayer", keep=0.25, remainder="none")
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
    model = collapse(vit(), "bayer", keep=0.5, remainder="none")
    with pytest.raises(CollapseError, match="keep must be a ratio"):
        model.keep = keep
    assert model.keep == 0.5


def test_wrong_arguments_name_what_was_given():
    model = collapse(vit(), "bayer", keep=0.5, remainder="none")
    cases = [
        (lambda: collapse("vit", "bayer"), "model must be"),
        (lambda: collapse(vit(), nn.Linear(2, 2)), "orderer must be a CollapseOrder"),
        (lambda: collapse(vit(), None), "orderer must be"),
        (lambda: collapse(vit(), "no_such_orderer"), "^orderer: 'no_such_orderer' is neither"),
        (lambda: timm.create_model("cvit_tiny_patch16", orderer="no_such_orderer"), "^orderer: 'no_such_orderer'"),
        (lambda: collapse(vit(), "bayer", positions="close"), "positions must be 'keep' for other than"),
        (
            lambda: collapse(vit(), "bayer", remainder="mean"),
            "remainder must be one of none, fused, coarse, mixed, split, zoom, got 'mean'",
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
    assert model.carrier.selection is None and model(IMAGES).shape == (2, 5)  # as before
    dynamic = collapse(vit(dynamic_img_size=True), "bayer", keep=0.5, remainder="none")
    with pytest.raises(CollapseError, match="multiples"):
        dynamic(torch.randn(1, 3, 60, 64))
