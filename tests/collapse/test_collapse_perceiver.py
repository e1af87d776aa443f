"""Collapsed Perceivers of transformers: pixels are dropped, against the model's own attention mask."""

import copy

import pytest
import torch
import transformers
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from timm_collapse import CollapseError, Order, collapse

CONFIG = {
    "num_latents": 6, "d_latents": 32, "num_blocks": 1, "num_self_attends_per_block": 2,
    "num_self_attention_heads": 2, "num_cross_attention_heads": 1, "image_size": 16, "num_labels": 3,
}  # fmt: skip
both = pytest.mark.parametrize("kind", ["Learned", "Fourier"])


def build(kind):
    """With weights that are large enough that every pixel matters."""
    torch.manual_seed(0)
    width = 512 if kind == "Learned" else 261
    config = transformers.PerceiverConfig(**CONFIG, d_model=width)
    model = getattr(transformers, f"PerceiverForImageClassification{kind}")(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


def example():
    torch.manual_seed(1)
    return torch.randn(2, 3, 16, 16), Order(torch.rand(2, 256), (16, 16))


@both
@torch.no_grad()
def test_dropped_pixels_are_as_if_masked_out(kind):
    model, (images, order) = build(kind), example()
    # the mask of the inputs; the decoder's is of the same shape, and unused there
    reference = model(images, attention_mask=order.mask(0.22).float()).logits
    full = model(images).logits
    collapse(model, "bayer", keep=0.22)
    assert torch.allclose(model(images, order=order).logits, reference, atol=1e-5)
    assert torch.equal(model(pixel_values=images, order=order).logits, model(images, order=order).logits)
    assert not torch.allclose(full, reference, atol=1e-3)
    model.keep = 1
    assert torch.equal(model(images).logits, full)


@both
def test_cost_falls_with_the_kept_pixels(kind):
    model, (images, order) = build(kind), example()
    collapse(model, "bayer", keep=1.0).requires_grad_(False)
    macs = {}
    for keep in (256, 128, 64):
        model.keep = keep
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(images, order=order)
        macs[keep] = counter.get_total_flops()
    assert macs[256] - macs[128] == 2 * (macs[128] - macs[64]) > 0  # linear


def test_ranker_orders_pixels_and_gradients_flow():
    model, (images, _) = build("Learned"), example()
    collapse(model, "collapse_ranker_tiny", keep=0.1)
    assert model.compute_order(images).grid == (16, 16)
    logits = model(images, labels=torch.tensor([0, 2])).loss
    logits.backward()
    assert all(p.grad is not None for p in model.perceiver.input_preprocessor.parameters())
    assert not any(p.requires_grad for p in model.orderer.parameters())
    twin = copy.deepcopy(model)
    assert torch.equal(twin(images).logits, model(images).logits)
    assert set(model.state_dict()) == set(build("Learned").state_dict())


def test_sizes_and_refusals():
    model = collapse(build("Learned"), "bayer", keep=0.5)
    large = torch.randn(1, 3, 20, 24)
    assert model(large, interpolate_pos_encoding=True).logits.shape == (1, 3)
    fourier = collapse(build("Fourier"), "bayer", keep=0.5)
    assert fourier(large).logits.shape == (1, 3)
    for call, message in (
        (lambda: model(large), r"pixel_values must be \(16, 16\).*\(20, 24\)"),
        (lambda: model(large[0]), "pixel_values must be a tensor of shape"),
        (lambda: model(large[..., :16, :16], attention_mask=torch.ones(1, 256)), "attention_mask"),
        (lambda: collapse(build("Learned"), "bayer", remainder="coarse"), "remainder must be none.*Perceiver"),
        (lambda: setattr(model, "remainder", "mixed"), "remainder must be none.*Perceiver"),
        (
            lambda: collapse(transformers.PerceiverForMaskedLM(transformers.PerceiverConfig(**CONFIG)), "bayer"),
            "collapsed",
        ),
    ):
        with pytest.raises(CollapseError, match=message):
            call()
