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


class Indices(nn.Module):
    def forward(self, scores):
        return Order(scores, (4, 9)).indices


def run_onnx(model, inputs, path):
    logging.getLogger("onnxscript").setLevel(logging.ERROR)
    torch.onnx.export(model, (inputs,), dynamo=True, verbose=False).save(path)
    session = onnxruntime.InferenceSession(path)
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: inputs.numpy()})[0])


def test_onnx_breaks_ties_as_we_do(tmp_path):
    scores = torch.randint(0, 4, (3, 36)).float()
    assert torch.equal(run_onnx(Indices(), scores, tmp_path / "indices.onnx"), Order(scores, (4, 9)).indices)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bayer", "collapse_ranker_tiny"])
def test_onnx_gives_the_same_logits(name, tmp_path):
    model = collapse(vit(patch_size=8), CollapseOrder.named(name), keep=6, remainder="fused")
    logits = run_onnx(model, IMAGES, tmp_path / "model.onnx")
    assert torch.allclose(logits, model(IMAGES), atol=1e-5)
