"""Multiply-accumulates against closed forms, and the median of runs."""

import itertools
from types import SimpleNamespace

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from timm_collapse.evaluation import MacCounter, count_macs, images_per_second


def vit_macs(width, depth, tokens, classes, patch_values):
    """Of a timm ViT with a class token: projection, blocks of 12 tokens d^2 + 2 tokens^2 d, head; on paper."""
    block = 12 * tokens * width**2 + 2 * tokens**2 * width
    return (tokens - 1) * patch_values * width + depth * block + width * classes


@pytest.mark.parametrize("how", ["fused", "fused, bf16", "math", "not fused"])
def test_vit_small_is_4_60_g_by_every_kernel_of_attention(how):
    vit, images = timm.create_model("vit_small_patch16_224").eval(), torch.randn(1, 3, 224, 224)
    for block in vit.blocks:
        block.attn.fused_attn = how != "not fused"
    kernels = [SDPBackend.MATH] if how == "math" else [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(kernels), torch.autocast("cpu", torch.bfloat16, enabled="bf16" in how):
        macs = count_macs(lambda: vit(images))
    assert macs == vit_macs(384, 12, 197, 1000, 768) and round(macs / 1e9, 2) == 4.60


def test_a_block_of_vit_small_at_patch_4_is_13_2_g():
    vit = timm.create_model("vit_small_patch16_224", patch_size=4, depth=1).eval()
    macs = count_macs(lambda: vit(torch.randn(1, 3, 224, 224)))
    assert macs == vit_macs(384, 1, 3137, 1000, 48) and round(macs / 1e9, 1) == 13.2


@pytest.mark.parametrize("kernel", [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH])
def test_the_backward_pass_of_attention_counts(kernel):
    q, k, v = (torch.randn(2, 3, n, 8, requires_grad=True) for n in (5, 7, 7))
    with sdpa_kernel(kernel), MacCounter() as counter:
        F.scaled_dot_product_attention(q, k, v).sum().backward()
    # two products forward; four backward, and the fused kernel makes the scores again
    assert counter.macs == 2 * 3 * 5 * 7 * 8 * (7 if kernel == SDPBackend.FLASH_ATTENTION else 6)


def test_attention_of_torch_itself_counts_also_on_its_fast_path():
    layer, x = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval(), torch.randn(3, 5, 8)
    assert count_macs(lambda: layer(x)) == 3 * (5 * 8 * 8 * 4 + 2 * 5 * 5 * 8 + 2 * 5 * 8 * 16)
    assert torch.backends.mha.get_fastpath_enabled()


A, B = torch.eye(6).repeat(2, 1, 1), torch.ones(2, 6, 4)


@pytest.mark.parametrize("call, macs", [
    (lambda: A @ B, 2 * 6 * 6 * 4),
    (lambda: torch.einsum("bij,bjk->bik", A, B), 2 * 6 * 6 * 4),
    (lambda: A[0] @ B[0, :, 0], 6 * 6),
    (lambda: torch.addmv(B[0, :, 0], A[0], B[0, :, 0]), 6 * 6),
    (lambda: B[0, :, 0] @ B[0, :, 0], 6),
    (lambda: F.conv2d(torch.ones(2, 3, 8, 8), torch.ones(5, 3, 4, 4), stride=4), 2 * 4 * 5 * 3 * 16),
    (lambda: torch.linalg.cholesky(A), 2 * 6**3 // 6),
    (lambda: torch.linalg.solve_triangular(A, B, upper=False), 2 * 6 * 6 * 4 // 2),
    (lambda: torch.linalg.solve(A, B), 2 * (6**3 // 3 + 6 * 6 * 4)),
    (lambda: torch.linalg.solve(A, B[:, :, 0]), 2 * (6**3 // 3 + 6 * 6)),
])  # fmt: skip
def test_what_counts(call, macs):
    assert count_macs(call) == macs


def test_the_median_of_an_even_number_of_runs_is_the_mean_of_the_middle_two(monkeypatch):
    clock = itertools.accumulate([0.0, 9.0, 1.0, 2.0, 4.0, 100.0])  # the first run warms up
    now = [next(clock)]
    monkeypatch.setattr("timm_collapse.evaluation.cost.time", SimpleNamespace(perf_counter=lambda: now[-1]))
    assert images_per_second({"a": lambda: now.append(next(clock))}, batch_size=6, runs=4) == {"a": 2.0}
