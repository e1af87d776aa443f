"""Collapsed models whose weights accelerate keeps elsewhere, and brings for each forward pass."""

import copy

import accelerate
import pytest
import timm
import torch
import transformers
from torch import nn
from vlm_small import build, inputs_of

from timm_collapse import collapse

TINY = {"embed_dim": 32, "depth": 2, "num_heads": 2}
HF = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 32}
TIMM = {
    "vit_tiny_patch16_224": {"img_size": 32, "patch_size": 8, **TINY},
    "cait_xxs24_224": {"img_size": 32, "patch_size": 8, **TINY},
    "naflexvit_base_patch16_gap": {"patch_size": 8, **TINY},
    "qwen3_vit_88m_merge": {"pos_embed_grid_size": 4, "patch_size": 4, **TINY},
    "gemma4_vit_167m": {
        "head_dim": 16,
        "intermediate_size": 48,
        "position_embedding_size": 32,
        "patch_size": 4,
        **TINY,
    },
}
CASES = [(name, "none") for name in TIMM]
CASES += [
    ("vit_tiny_patch16_224", "mixed"),
    ("naflexvit_base_patch16_gap", "coarse"),
    ("ViT", None),
    ("naflexvit_base_patch16_gap", None),
]
CASES += [(name, remainder) for name in ("ViT", "Dinov2", "CLIPVision") for remainder in ("none", "coarse")]


def make(name):
    if name in TIMM:
        model = timm.create_model(name, num_classes=5, **TIMM[name])
    else:
        model = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**HF, patch_size=8))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


def output(model, images):
    found = model(images)
    return found if isinstance(found, torch.Tensor) else found.last_hidden_state


def offload(model):
    return accelerate.cpu_offload(model, execution_device="cpu")


@torch.no_grad()
@pytest.mark.parametrize("name, remainder", CASES)
def test_offloaded_before_or_after_it_is_collapsed(name, remainder):
    plain, images = make(name), torch.randn(2, 3, 32, 32)
    settings = {"orderer": "bayer", "keep": 0.5, "remainder": remainder}
    whole, expected = output(plain, images), output(collapse(copy.deepcopy(plain), **settings), images)
    after = offload(collapse(copy.deepcopy(plain), **settings))
    before = collapse(offload(plain), **settings)
    for model in (after, before):
        assert all(p.is_meta for p in model.parameters())
        for _ in range(2):
            assert torch.equal(output(model, images), expected)
        model.keep = 1
        assert torch.equal(output(model, images), whole)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llava_clip", "qwen3", "smolvlm"])
def test_a_vision_language_model_on_several_devices(name, tmp_path):
    stock, processor = build(name)
    inputs, answer = inputs_of(name, processor), {"max_new_tokens": 3, "do_sample": False}
    stock.save_pretrained(tmp_path / "model")
    collapse(stock, "bayer", keep=0.5)
    expected, ids = stock(**inputs).logits, stock.generate(**inputs, **answer)
    parts = {part: "disk" if part in ("language_model", "text_model") else "cpu" for part in stock.model._modules}
    split = {"lm_head": "cpu"} | {f"model.{part}": device for part, device in parts.items()}
    for where in ("auto", split):
        model = (
            type(stock)
            .__bases__[1]
            .from_pretrained(tmp_path / "model", device_map=where, offload_folder=tmp_path / "disk")
        )
        collapse(model.eval(), "bayer", keep=0.5)
        assert where == "auto" or any(p.is_meta for p in model.parameters())
        assert torch.equal(model(**inputs).logits, expected)
        assert torch.equal(model.generate(**inputs, **answer), ids)
