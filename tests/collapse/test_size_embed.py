"""The size embedding: what a token's area adds to it; where it is kept, saved and refused."""

import copy
import pickle

import pytest
import timm
import torch
import transformers
from safetensors.torch import load_file
from timm.models import save_for_hf
from torch import nn

from timm_collapse import CollapseError, Order, collapse
from timm_collapse.evaluation.accuracy import with_orderer
from timm_collapse.hub.save import pretrained_source, save_model

TINY = {"img_size": 64, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
ORDER = Order(torch.rand(2, 64, generator=torch.Generator().manual_seed(2)), (8, 8))
FAMILIES = [
    "vit_small_patch16_224",
    "vit_small_patch16_dinov3",
    "naflexvit_base_patch16_gap",
    "cait_xxs24_224",
    "beit_base_patch16_224",
]


def vit(name="vit_tiny_patch16_224"):
    torch.manual_seed(0)
    shape = {key: value for key, value in TINY.items() if not (name.startswith("naflexvit") and key == "img_size")}
    model = timm.create_model(name, **shape).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def sized(**kwargs):
    model = collapse(vit(), "bayer", keep=20, size_embed=True, **{"remainder": "mixed", **kwargs})
    nn.init.normal_(model.size_embed)
    return model


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("remainder", ["fused", "mixed", "split", "zoom"])
def test_it_adds_by_area_and_starts_at_nothing(name, remainder):
    model = collapse(vit(name), "bayer", keep=20, remainder=remainder)
    before = model(IMAGES, order=ORDER)
    assert model.size_embed is None and "size_embed" not in model.state_dict()
    collapse(model, "bayer", keep=20, remainder=remainder, size_embed=True)
    assert model.size_embed.shape == (2, 32) and torch.equal(model(IMAGES, order=ORDER), before)
    plain = model.select(IMAGES, ORDER)
    nn.init.normal_(model.size_embed)
    found = model.select(IMAGES, ORDER)
    areas = plain.areas.expand(2, -1)
    for image in range(2):
        for token in range(areas.shape[1]):
            added = model.size_embed[0] + model.size_embed[1] * areas[image, token].log()
            assert torch.allclose(found.extra[image, token], plain.extra[image, token] + added, atol=1e-5)
    assert torch.equal(found.kept, plain.kept)
    assert not torch.allclose(model(IMAGES, order=ORDER), before, atol=1e-3)
    model(IMAGES, order=ORDER).sum().backward()
    assert model.size_embed.grad.abs().max() > 0
    model.keep = 1
    assert torch.equal(model(IMAGES), model(IMAGES, order=None))


def test_collapsing_again_keeps_it_unless_told_otherwise():
    model = sized()
    own = model.size_embed
    assert collapse(model, "variance", keep=30).size_embed is own
    assert collapse(model, "variance", keep=30, size_embed=True).size_embed is own
    assert with_orderer(model, "bayer").size_embed is own  # shared
    assert collapse(model, "variance", keep=30, size_embed=False).size_embed is None
    assert "size_embed" not in dict(model.named_parameters())


@pytest.mark.parametrize("save", [lambda m, f: save_for_hf(m, str(f), safe_serialization=True), save_model])
def test_it_is_saved_with_the_model(save, tmp_path):
    model = sized()
    save(model, tmp_path)
    assert torch.equal(load_file(tmp_path / "model.safetensors")["size_embed"], model.size_embed)
    for kwargs in ({}, {"keep": 30}):
        loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, **kwargs).eval()
        model.keep = kwargs.get("keep", 20)
        assert torch.equal(loaded.size_embed, model.size_embed) and torch.equal(loaded(IMAGES), model(IMAGES))
    fresh = timm.create_model(f"local-dir:{tmp_path}")
    assert torch.equal(fresh.size_embed, torch.zeros(2, 32))


def test_weights_with_one_start_any_model_of_the_architecture(tmp_path):
    model = timm.create_model("cvit_tiny_patch16", **TINY, orderer="bayer", remainder="split", keep=20, size_embed=True)
    nn.init.normal_(model.size_embed)
    save_model(model.eval(), tmp_path)
    source = {"pretrained": True, "pretrained_cfg_overlay": pretrained_source(tmp_path)}
    shape = {**TINY, "num_classes": 3}
    started = timm.create_model("cvit_tiny_patch16", **shape, orderer="bayer", **source)
    assert torch.equal(started.size_embed, model.size_embed)
    assert torch.equal(started.blocks[0].attn.qkv.weight, model.blocks[0].attn.qkv.weight)
    refused = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, size_embed=False)
    assert refused.size_embed is None and torch.equal(refused.pos_embed, model.pos_embed)
    without = timm.create_model("cvit_tiny_patch16", **TINY, orderer="bayer")
    assert without.size_embed is None and not without._model_args["size_embed"]


def test_copies_and_pickles_have_their_own():
    model = sized()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.size_embed is not model.size_embed and torch.equal(twin(IMAGES), model(IMAGES))
    low = copy.deepcopy(model).bfloat16()
    assert low.size_embed.dtype == torch.bfloat16 and low(IMAGES.bfloat16()).isfinite().all()


@torch.no_grad()
def test_it_is_exported():
    model = sized(remainder="split", area_bias=0.5)
    exported = torch.export.export(model, (IMAGES,), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()
    more = IMAGES.repeat(2, 1, 1, 1)
    assert torch.allclose(exported(more), model(more), atol=1e-5)


def test_what_cannot_have_one_says_why():
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.ViTConfig(**shape, image_size=64, patch_size=8)
    with pytest.raises(CollapseError, match="size_embed must be False, got True: save_pretrained writes the plain"):
        collapse(transformers.ViTModel(config), "bayer", size_embed=True)
    model = vit()
    with pytest.raises(CollapseError, match="size_embed must be True, False or None, got 1"):
        collapse(model, "bayer", size_embed=1)
    assert type(model).__name__ == "VisionTransformer"  # as it was
