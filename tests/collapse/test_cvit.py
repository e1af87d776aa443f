import json

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed, resample_patch_embed

from timm_collapse import CollapseError, CollapseOrder, Order, collapse
from timm_collapse.collapse.base import Collapsed
from timm_collapse.collapse.cvit import BASES, RESAMPLED
from timm_collapse.hub.save import save_model

SHAPE = {"embed_dim": 24, "depth": 2, "num_heads": 2}


@pytest.mark.parametrize("name", BASES)
def test_every_cvit_has_the_tags_and_weights_of_its_base(name):
    base = BASES[name]
    ours = {m.removeprefix(name) for m in timm.list_models(f"{name}.*", pretrained=True)}
    theirs = {m.removeprefix(base) for m in timm.list_models(f"{base}.*", pretrained=True)}
    assert ours == theirs and ours
    default = timm.get_pretrained_cfg(name)
    assert default.hf_hub_id == timm.get_pretrained_cfg(base).hf_hub_id and default.hf_hub_id.startswith("timm/vit")
    assert default.tag == timm.get_pretrained_cfg(base).tag


@pytest.mark.parametrize("name", ["cvit_base_patch16", "cvit_base_patch16_dinov3", "cvit_base_patch16_siglip"])
def test_parameters_are_those_of_the_base(name):
    shape = {**SHAPE, "img_size": 64, "num_classes": 5}
    if "dinov3" in name:
        shape["embed_dim"] = 32
    cvit = timm.create_model(name, **shape, remainder="none")
    vit = timm.create_model(BASES[name], **shape)
    assert isinstance(cvit, Collapsed) and isinstance(cvit, type(vit)) and cvit.keep == 0.22
    cvit.load_state_dict(vit.state_dict())  # strict
    images = torch.randn(2, 3, 64, 64)
    cvit.eval(), vit.eval()
    cvit.keep = 1
    assert torch.equal(cvit(images), vit(images))
    cvit.keep = 0.5
    assert cvit.forward_features(images).shape[1] == vit.num_prefix_tokens + 8


def test_cells_and_patches_have_their_own_orderers():
    def source(name, **kwargs):
        shape = {**SHAPE, "img_size": 64} if "64" not in name and "32" not in name else SHAPE
        return timm.create_model(name, **shape, **kwargs).orderer.source

    assert source("cvit_base_patch16") == source("cvit_tiny_patch16") == "collapse_ranker_cells_224"
    assert source("cvit_base_patch16", remainder="mixed") == "collapse_ranker_cells_224"
    assert source("cvit_base_patch16", remainder="none") == "collapse_ranker_tiny_224"
    assert source("cvit_base_patch16", remainder="coarse") == "collapse_ranker_tiny_224"
    assert source("cvit_small_patch16", remainder="none") == "collapse_ranker_nano_224"
    assert source("cvit_base_patch16", orderer="collapse_ranker_nano_224") == "collapse_ranker_nano_224"
    for remainder in ("none", "split"):
        assert source("cvit_tiny_patch8_64", remainder=remainder) == "collapse_ranker_tiny.tin100_features"


def test_what_is_not_given_is_what_is_best_frozen():
    def settings(model):
        return model.keep, model.remainder, model.coarse_share, model.area_bias

    shape = {**SHAPE, "img_size": 64}
    vit = timm.create_model("vit_tiny_patch16_224", **shape)
    assert settings(collapse(vit, "bayer")) == (0.22, "split", 0.5, 0.5)
    assert settings(collapse(vit, "bayer", remainder="mixed")) == (0.22, "mixed", 0.5, 0.0)
    assert settings(collapse(vit, "bayer", remainder="none")) == (0.22, "none", 0.5, 0.0)
    assert settings(collapse(vit, "bayer", area_bias=0.7)) == (0.22, "split", 0.5, 0.7)
    assert settings(timm.create_model("cvit_tiny_patch16", orderer="bayer", **shape)) == (0.22, "split", 0.5, 0.5)
    # as far as a model can take them
    cait = timm.create_model("cait_xxs24_224", **shape)
    assert settings(collapse(cait, "bayer")) == (0.22, "split", 0.5, 0.0)
    # trained on the first patches alone
    assert settings(timm.create_model("cvit_tiny_patch4_32", **SHAPE)) == (0.22, "none", 0.5, 0.0)
    assert settings(timm.create_model("cvit_tiny_patch8_64.tin100", pretrained=True))[1:] == ("none", 0.5, 0.0)


@pytest.mark.parametrize("keep", [2, 5, 0.22, 0.5, 0.9, 195])
def test_the_default_has_tokens_for_every_budget(keep):
    cvit = timm.create_model("cvit_tiny_patch16", keep=keep, orderer="bayer", **SHAPE).eval()  # 14 x 14 patches
    tokens = cvit.forward_features(torch.randn(2, 3, 224, 224)).shape[1] - cvit.num_prefix_tokens
    budget = keep if keep > 1 else round(keep * 196)
    assert max(1, budget - 2) <= tokens <= budget


@pytest.mark.parametrize("name", RESAMPLED)
def test_smaller_patches_have_the_tags_and_the_weights_of_larger_ones(name):
    large, patch = RESAMPLED[name], int(name.rpartition("patch")[2])
    ours, theirs = ({m.removeprefix(n) for m in timm.list_models(f"{n}.*", pretrained=True)} for n in (name, large))
    assert ours == theirs and timm.get_pretrained_cfg(name).hf_hub_id == timm.get_pretrained_cfg(large).hf_hub_id
    with torch.device("meta"):
        cvit = timm.create_model(name)
    assert cvit.patch_embed.grid_size == (224 // patch, 224 // patch)
    assert cvit.embed_dim == timm.create_model(large, depth=1).embed_dim


def test_smaller_patches_start_from_the_weights_of_larger_ones(tmp_path):
    plain = timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=5, **SHAPE)
    save_file(plain.state_dict(), tmp_path / "model.safetensors")
    overlay = {"file": str(tmp_path / "model.safetensors"), "num_classes": 5}
    for name, kwargs, patch in (
        ("cvit_tiny_patch4", {}, 4),
        ("cvit_tiny_patch1", {}, 1),
        ("cvit_tiny_patch16", {"patch_size": 2}, 2),
        ("cvit_tiny_patch4", {"patch_size": 32}, 32),
    ):
        cvit = timm.create_model(
            name, pretrained=True, pretrained_cfg_overlay=overlay, img_size=64, num_classes=5, **SHAPE, **kwargs
        )
        for key, value in cvit.state_dict().items():
            expected = plain.state_dict()[key]
            if key == "patch_embed.proj.weight":
                expected = resample_patch_embed(expected, [patch, patch])
            elif key == "pos_embed":
                expected = resample_abs_pos_embed(expected, [64 // patch, 64 // patch])
            assert torch.allclose(value, expected, atol=1e-5), key
        assert cvit.eval()(torch.randn(1, 3, 64, 64)).shape == (1, 5)


def test_arguments_reach_the_collapse_and_the_base():
    cvit = timm.create_model("cvit_small_patch16", keep=0.5, orderer="bayer", remainder="coarse", img_size=64, **SHAPE)
    assert (cvit.keep, cvit.orderer.baseline_name, cvit.remainder) == (0.5, "bayer", "coarse")
    assert cvit.pretrained_cfg["architecture"] == "cvit_small_patch16" and len(cvit.blocks) == 2
    with pytest.raises(CollapseError, match="no-such-orderer"):
        timm.create_model("cvit_small_patch16", orderer="no-such-orderer", **SHAPE)


def test_saved_and_loaded_with_keep_orderer_and_remainder(tmp_path):
    cvit = timm.create_model("cvit_tiny_patch4_32", orderer="variance", keep=0.3, num_classes=7, **SHAPE).eval()
    cvit.keep, images = 0.4, torch.randn(2, 3, 32, 32)
    timm.models.save_for_hf(cvit, str(tmp_path), safe_serialization=True)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert (loaded.keep, loaded.orderer.baseline_name) == (0.4, "variance")
    assert torch.equal(loaded(images), cvit(images))
    other = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, keep=1.0).eval()
    cvit.keep = 1.0
    assert torch.equal(other(images), cvit(images))


def test_an_orderer_without_a_name_is_not_saved_as_another(tmp_path):
    cvit = timm.create_model("cvit_tiny_patch4_32", **SHAPE).eval()
    collapse(cvit, CollapseOrder.baseline("bayer"))
    timm.models.save_for_hf(cvit, str(tmp_path), safe_serialization=True)
    assert timm.create_model(f"local-dir:{tmp_path}", pretrained=True).orderer.baseline_name == "bayer"
    collapse(cvit, CollapseOrder(timm.create_model("collapse_ranker_tiny", img_size=16, patch_size=4, dim=32, depth=1)))
    timm.models.save_for_hf(cvit, str(tmp_path), safe_serialization=True)  # timm's, which knows of no orderer
    with pytest.raises(CollapseError, match="only beside the weights of its model"):
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    save_model(cvit, tmp_path)
    images = torch.randn(2, 3, 32, 32)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(loaded(images), cvit(images))
    assert torch.equal(loaded.compute_order(images).indices, cvit.compute_order(images).indices)


def test_plain_checkpoint_loads_into_a_cvit_by_name(tmp_path):
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=4, num_classes=10, **SHAPE).eval()
    timm.models.save_for_hf(vit, str(tmp_path), safe_serialization=True)
    overlay = {"file": str(tmp_path / "model.safetensors"), "num_classes": 10}
    cvit = timm.create_model("cvit_tiny_patch4_32", pretrained=True, pretrained_cfg_overlay=overlay, keep=1.0, **SHAPE)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(cvit.eval()(images), vit(images))


def test_features_only_lies_on_the_grid():
    cvit = timm.create_model(
        "cvit_tiny_patch16", features_only=True, img_size=64, out_indices=(0, 1), remainder="none", **SHAPE
    )
    features = cvit(torch.randn(2, 3, 64, 64))
    assert [f.shape for f in features] == [(2, 24, 4, 4)] * 2
    assert all((f.abs().sum(1) == 0).sum() == 2 * (16 - 4) for f in features)  # 4 of 16 are kept


def test_given_order_decides():
    cvit = timm.create_model("cvit_tiny_patch4_32", orderer="raster", keep=0.25, **SHAPE).eval()
    images = torch.randn(1, 3, 32, 32)
    order = Order(torch.rand(1, 64), (8, 8))
    kept = order.keep(0.25)[0]
    blanked = torch.zeros_like(images)
    for n in kept.tolist():
        rows, columns = slice(4 * (n // 8), 4 * (n // 8) + 4), slice(4 * (n % 8), 4 * (n % 8) + 4)
        blanked[:, :, rows, columns] = images[:, :, rows, columns]
    assert torch.equal(cvit(images, order=order), cvit(blanked, order=order))  # sees nothing else
    assert not torch.allclose(cvit(images, order=order), cvit(images))


def test_config_json_is_plain(tmp_path):
    cvit = timm.create_model("cvit_tiny_patch4_32", keep=16, **SHAPE)
    timm.models.save_for_hf(cvit, str(tmp_path), safe_serialization=True)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architecture"] == "cvit_tiny_patch4_32"
    assert (
        config["model_args"]["keep"] == 16
        and config["model_args"]["orderer"] == "collapse_ranker_tiny.cifar10_features"
    )


@pytest.mark.parametrize("name", ["cvit_tiny_patch8_64.tin100", "cvit_tiny_patch4_32.cifar10"])
def test_bundled_models_load_offline_with_their_orderer(name):
    cvit = timm.create_model(name, pretrained=True).eval()
    assert cvit.keep == 0.22 and not isinstance(cvit.orderer.baseline_name, str)
    images = torch.rand(4, 3, *cvit.patch_embed.img_size)
    with torch.no_grad():
        spread = cvit(images).softmax(-1).std(0).max()
        cvit.keep = 1
        assert spread > 1e-3 and cvit(images).isfinite().all()  # it looks at the image
    untrained = timm.create_model(name.split(".")[0])
    assert not torch.equal(untrained.head.weight, cvit.head.weight)
