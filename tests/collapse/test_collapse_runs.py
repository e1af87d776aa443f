"""A collapsed model compiled, exported, traced and in ONNX."""

import logging

import onnxruntime
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from timm_collapse import CollapseOrder, Order, collapse

TINY = {"img_size": 64, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
RANKER = {"img_size": 16, "patch_size": 4, "dim": 32, "depth": 1, "rank": 8, "phases": (0.0, 0.25)}
IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def vit(name="vit_tiny_patch16_224", **kwargs):
    return timm.create_model(name, **{**TINY, **kwargs}).eval()


def orderer() -> CollapseOrder:
    """One with parameters."""
    return CollapseOrder(timm.create_model("collapse_ranker_tiny", **RANKER))


def test_compile_export_and_trace_give_the_same_logits():
    for model in (
        collapse(vit(), "bayer", keep=0.3, remainder="coarse"),
        collapse(vit("beit_base_patch16_224"), orderer(), keep=0.3, remainder="none"),
        collapse(vit("eva02_tiny_patch14_224", img_size=56), orderer(), keep=0.3, remainder="none"),
    ):
        images = F.interpolate(IMAGES, model.patch_embed.img_size)
        with torch.no_grad():
            logits = model(images)
            assert torch.allclose(torch.compile(model, fullgraph=True, backend="aot_eager")(images), logits, atol=1e-5)
            assert torch.allclose(torch.export.export(model, (images,)).module()(images), logits, atol=1e-5)
            assert torch.allclose(torch.jit.trace(model, (images,))(images), logits, atol=1e-5)
        torch._dynamo.reset()


DYNAMIC = {
    "vit coarse": ("vit_tiny_patch16_224", {}, "bayer", "coarse"),
    "vit fused": ("vit_tiny_patch16_224", {}, None, "fused"),
    "vit mixed": ("vit_tiny_patch16_224", {"patch_size": 4}, "variance", "mixed"),
    "vit, the default": ("vit_tiny_patch16_224", {}, "variance", None),
    "eva": ("vit_small_patch16_dinov3", {}, "variance", "none"),
    "beit": ("beit_base_patch16_224", {}, "gradient", "none"),
    "cait": ("cait_xxs24_224", {}, "variance", "fused"),
    "naflex": ("naflexvit_base_patch16_gap", {"img_size": None}, "variance", "none"),
}


@pytest.mark.parametrize("case", DYNAMIC)
@torch.no_grad()
def test_exported_and_traced_models_take_any_batch(case):
    name, kwargs, order, remainder = DYNAMIC[case]
    kwargs = {key: value for key, value in {**TINY, **kwargs}.items() if value is not None}
    model = collapse(timm.create_model(name, **kwargs).eval(), order or orderer(), keep=0.3, remainder=remainder)
    shapes = ({0: torch.export.Dim("batch")},)
    exported = torch.export.export(model, (IMAGES,), dynamic_shapes=shapes).module()
    traced = torch.jit.trace(model, (IMAGES,), check_trace=False)
    for batch in (5, 2, 1):
        images = torch.randn(batch, 3, 64, 64)
        logits = model(images)
        assert torch.allclose(exported(images), logits, atol=1e-5)
        assert traced(images).shape == logits.shape and torch.allclose(traced(images), logits, atol=1e-5)


@torch.no_grad()
def test_the_budget_of_a_compiled_model_may_change():
    model = collapse(vit(), "variance", keep=0.5, remainder="coarse")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for keep, share in ((0.5, 0.5), (0.3, 0.25), (0.25, 0.5), (6, 0.75), (7, 0.5), (1, 0.5)):
        model.keep, model.coarse_share = keep, share
        for batch in (2, 3):
            images = torch.randn(batch, 3, 64, 64)
            assert torch.allclose(compiled(images), model(images), atol=1e-5)
    torch._dynamo.reset()


@torch.no_grad()
def test_a_compiled_model_takes_batches_of_other_sizes_in_a_row():
    model = collapse(vit(depth=1), "bayer", keep=0.3, remainder="none")
    batches = [torch.randn(batch, 3, 64, 64) for batch in (2, 3, 5)]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = [compiled(images) for images in batches]  # no other pass in between
    assert all(torch.allclose(logits, model(images), atol=1e-5) for logits, images in zip(found, batches, strict=True))
    torch._dynamo.reset()


class Indices(nn.Module):
    def forward(self, scores):
        return Order(scores, (4, 9)).indices


def run_onnx(model, inputs, path, *others):
    """What the ONNX graph that is made with some inputs gives for them, or for others (a list)."""
    logging.getLogger("onnxscript").setLevel(logging.ERROR)
    shapes = ({0: torch.export.Dim("batch")},) if others else None
    torch.onnx.export(model, (inputs,), dynamo=True, verbose=False, dynamic_shapes=shapes).save(path)
    session = onnxruntime.InferenceSession(path)
    found = [session.run(None, {session.get_inputs()[0].name: each.numpy()})[0] for each in (inputs, *others)]
    return [torch.from_numpy(each) for each in found] if others else torch.from_numpy(found[0])


def test_onnx_takes_any_batch(tmp_path):
    model = collapse(vit(), orderer(), keep=0.3, remainder="fused")
    batches = [IMAGES, torch.randn(5, 3, 64, 64), torch.randn(1, 3, 64, 64)]
    for logits, images in zip(run_onnx(model, IMAGES, tmp_path / "model.onnx", *batches[1:]), batches, strict=True):
        assert torch.allclose(logits, model(images), atol=1e-5)


def test_onnx_breaks_ties_as_we_do(tmp_path):
    scores = torch.randint(0, 4, (3, 36)).float()
    assert torch.equal(run_onnx(Indices(), scores, tmp_path / "indices.onnx"), Order(scores, (4, 9)).indices)


@pytest.mark.slow
@pytest.mark.parametrize("name, remainder", [("bayer", "fused"), ("collapse_ranker_tiny", "fused"), ("bayer", "zoom")])
def test_onnx_gives_the_same_logits(name, remainder, tmp_path):
    model = collapse(vit(patch_size=8), CollapseOrder.named(name), keep=6, remainder=remainder)
    logits = run_onnx(model, IMAGES, tmp_path / "model.onnx")
    assert torch.allclose(logits, model(IMAGES), atol=1e-5)
