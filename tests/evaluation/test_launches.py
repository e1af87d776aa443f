"""Launch counts against what is written down here; the order of the turns in which calls are timed."""

import pytest
import timm
import torch
from torch import nn

from timm_collapse.evaluation import LaunchCounter, count_kernels, count_launches, median_seconds
from timm_collapse.evaluation.cost import working_memory

X = torch.randn(4, 6)


@pytest.mark.parametrize("call, launches", [
    (lambda: X @ X.mT, 1),
    (lambda: X.view(2, 12).unflatten(1, (3, 4)).transpose(0, 1)[1:], 0),  # views
    (lambda: [part.expand(4, 2) for part in X.chunk(3, dim=1)], 0),
    (lambda: torch.empty(3).detach(), 0),  # new memory
    (lambda: X.t().contiguous(), 1),
    (lambda: X.clone().mul_(2).add_(X), 3),
    (lambda: torch.cat([X, X]).softmax(-1), 2),
    (lambda: nn.functional.linear(X, X, X[:, 0]), 1),
    (lambda: X.sort(1), 1),
    (lambda: X.to(torch.bfloat16).to(torch.bfloat16), 1),
])  # fmt: skip
def test_what_computes_is_a_launch(call, launches):
    assert count_launches(call) == launches


def test_a_block_of_a_vit_on_paper():
    def launches(depth):
        vit = timm.create_model("vit_tiny_patch16_224", depth=depth, embed_dim=24, num_heads=2, img_size=32).eval()
        return count_launches(lambda: vit(torch.randn(2, 3, 32, 32)))

    # two norms, four linear layers, attention, GELU, two sums
    assert launches(3) - launches(2) == launches(2) - launches(1) == 10


def test_the_backward_pass_counts():
    x = X.clone().requires_grad_()
    with LaunchCounter() as counter:
        loss = (x @ X.mT).sum()
        forward = counter.launches
        loss.backward()
    assert forward == 2 and counter.launches >= 4


def test_without_a_gpu_no_kernels_and_no_memory_are_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    ran = []
    assert count_kernels(lambda: ran.append(1)) is None and working_memory(lambda: ran.append(1)) is None
    assert ran == [1]  # the memory's call warms up all the same


def test_calls_are_timed_in_turn_until_it_is_enough():
    calls = []
    both = {name: lambda name=name: calls.append(name) for name in "ab"}
    median_seconds(both, runs=2, warm_ups=1)
    assert "".join(calls) == "ababab"
    calls.clear()
    seconds = median_seconds(both, runs=9, warm_ups=0, enough=lambda: len(calls) >= 4)
    assert "".join(calls) == "abab" and set(seconds) == {"a", "b"}
