"""One collapsed model in several threads, and passes inside of passes: each has its own selection."""

import copy
import threading

import pytest
import timm
import torch
import transformers

from timm_collapse import CollapseError, Order, collapse

TINY = {"img_size": 64, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
HF = {
    "ViT": ("ViTForImageClassification", "ViTConfig"),
    "DINOv3": ("DINOv3ViTModel", "DINOv3ViTConfig"),
    "CLIP": ("CLIPVisionModel", "CLIPVisionConfig"),
}
FAMILIES = [
    "vit_tiny_patch16_224",
    "vit_small_patch16_dinov3",
    "beit_base_patch16_224",
    "cait_xxs24_224",
    "naflex",
    *HF,
]
every = pytest.mark.parametrize("name", FAMILIES)


def build(name):
    if name in HF:
        cls, config = HF[name]
        return getattr(transformers, cls)(getattr(transformers, config)(**SMALL, image_size=64, patch_size=16)).eval()
    if name == "naflex":
        kwargs = {key: value for key, value in TINY.items() if key != "img_size"}
        return timm.create_model("naflexvit_base_patch16_gap", **kwargs).eval()
    return timm.create_model(name, **TINY).eval()


def answer(model, images, order=None):
    output = model(images, order=order)
    return output if isinstance(output, torch.Tensor) else output[0]


@every
@torch.no_grad()
def test_threads_share_a_model(name):
    model = build(name)
    for parameter in model.parameters():
        parameter.normal_(std=0.1)
    collapse(model, "variance", keep=0.4, remainder="coarse")
    batches = [torch.randn(1 + i % 3, 3, 64, 64) for i in range(32)]
    expected = [answer(model, images) for images in batches]
    found, start = [None] * len(batches), threading.Barrier(4)

    def work(first):
        with torch.no_grad():
            start.wait()
            for i in range(first, len(batches), 4):
                found[i] = answer(model, batches[i])

    threads = [threading.Thread(target=work, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(ours is not None and torch.allclose(ours, theirs, atol=1e-6) for ours, theirs in zip(found, expected))


@every
def test_a_pass_inside_of_a_pass_has_its_own_selection(name):
    model, images = collapse(build(name), "raster", keep=0.25, remainder="none"), torch.randn(2, 3, 64, 64)
    order, other = Order(torch.rand(2, 16), (4, 4)), Order(torch.rand(3, 16), (4, 4))
    expected, inner = answer(model, images, order), []
    part = next(module for module in model.modules() if isinstance(module, torch.nn.Conv2d | torch.nn.Linear))
    embeds = getattr(model, "patch_embed", None) or getattr(model, "embeds", part)

    def again(module, args):
        handle.remove()
        inner.append(answer(model, torch.ones(3, 3, 64, 64), other))

    handle = embeds.register_forward_pre_hook(again)
    assert torch.equal(answer(model, images, order), expected)
    assert torch.equal(inner[0], answer(model, torch.ones(3, 3, 64, 64), other))


@every
def test_a_failed_pass_leaves_nothing_behind(name):
    model, images = collapse(build(name), "raster", keep=0.25, remainder="none"), torch.randn(2, 3, 64, 64)
    plain, expected = copy.deepcopy(model), answer(model, images)

    def fail(module, args, output):
        raise RuntimeError("in the middle")

    norm = [module for module in model.modules() if isinstance(module, torch.nn.LayerNorm)][-1]
    handle = norm.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        model(images)
    handle.remove()
    assert model.carrier.selection is None
    assert torch.equal(answer(model, images), expected)
    plain.keep = model.keep = 1
    assert torch.equal(answer(model, images), answer(plain, images))


def test_recomputation_of_the_whole_pass_gives_the_same_gradients():
    model, images = (
        collapse(build("vit_tiny_patch16_224"), "variance", keep=0.4, remainder="fused"),
        torch.randn(2, 3, 64, 64),
    )
    model(images).square().sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    for reentrant in (False, True):
        model.zero_grad()
        inputs = images.clone().requires_grad_()
        torch.utils.checkpoint.checkpoint(model, inputs, use_reentrant=reentrant).square().sum().backward()
        assert all(torch.allclose(p.grad, expected[n], atol=1e-6) for n, p in model.named_parameters() if n in expected)


def test_data_parallel_is_refused_with_the_reason():
    with pytest.raises(CollapseError, match="leave its orderer on one device"):
        collapse(build("vit_tiny_patch16_224"), "bayer")._replicate_for_data_parallel()
