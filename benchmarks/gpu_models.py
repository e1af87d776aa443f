"""What the parts of `gpu.py` share: how much is measured, the machine, the models and their variants, timing.

All models have random weights, on which no cost depends; the orderers are the bundled ones that each `cvit_*` takes.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
from gpu_runner import Bench, attempt, failed
from token_merging import input_size
from torch import Tensor, nn

import timm_collapse  # noqa: F401  (registers the models)
from timm_collapse.collapse.cvit import BASES
from timm_collapse.evaluation import count_kernels, count_launches, median_seconds
from timm_collapse.evaluation.cost import cuda_graph, working_memory
from timm_collapse.evaluation.report import hardware
from timm_collapse.order import resolve_keep

PLAIN, EAGER, GRAPH = "plain", "eager", "CUDA graph"
CHECKED_BATCH = 8  # of launches and of what is compiled first


@dataclass(frozen=True)
class Size:
    """How much is measured: all of it on a GPU, or a miniature on any machine.

    Attributes:
        models: Registered cvit_*; model_args: for them and their bases.
        keeps: Ratios of kept patches. batches: sizes. runs: timed ones of each call, of which the median counts.
        backend, modes: Of torch.compile.
        mar, mar_batch, mar_steps, diffusion_steps: Of generation.
        long_model, long_side: A cvit_* and its image side, for long sequences.
        train_args: For the ViT that is trained; train_batch: images of its steps.
    """

    models: tuple[str, ...] = ("cvit_base_patch16", "cvit_small_patch16", "cvit_tiny_patch16")
    model_args: dict[str, int] = field(default_factory=dict)
    keeps: tuple[float, ...] = (0.22, 0.5)
    batches: tuple[int, ...] = (1, 8, 64, 256)
    runs: int = 15
    backend: str = "inductor"
    modes: tuple[str, ...] = ("default", "reduce-overhead")
    mar: str = "mar_base"
    mar_batch: int = 16
    mar_steps: int = 64
    diffusion_steps: int = 100
    long_model: str = "cvit_base_patch1"
    long_side: int = 224
    long_keeps: tuple[float, ...] = (0.22, 0.05)
    train_args: dict[str, int] = field(default_factory=dict)
    train_batch: int = 1024


TINY = Size(
    models=("cvit_tiny_patch16",),
    model_args={"depth": 2, "embed_dim": 32, "num_heads": 2},
    batches=(1, 2),
    runs=1,
    backend="eager",
    modes=("default",),
    mar="mar_tiny_patch4_32",
    mar_batch=2,
    mar_steps=3,
    diffusion_steps=3,
    long_model="cvit_tiny_patch1",
    long_side=32,
    train_args={"depth": 2, "embed_dim": 48, "num_heads": 3},
    train_batch=64,
)


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def dtype() -> torch.dtype:
    return torch.bfloat16 if torch.cuda.is_available() else torch.float32


# -- the machine -------------------------------------------------------------------------------------------------------


def about(bench: Bench) -> None:
    """The machine and its ceilings, which every other figure is to be read against."""
    facts = {"hardware": hardware(), "torch": torch.__version__, "timm": timm.__version__}
    facts |= {"python": platform.python_version(), "cpu_cores": len(os.sched_getaffinity(0))}
    facts["gpu"] = device().type == "cuda"
    bench.record.data["about"] = facts
    bench.record.save()
    if not facts["gpu"]:
        return
    facts["gpu_gib"] = round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1)
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    small, source = torch.zeros(1, device="cuda"), torch.empty(2**32, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    calls = {
        "product": lambda: a @ b,
        "copy": lambda: target.copy_(source),
        "launches": lambda: [small.add_(1) for _ in range(1000)],
    }
    seconds = median_seconds(calls, runs=5, warm_ups=2)
    facts["bf16_tflops"] = round(2 * 8192**3 / seconds["product"] / 1e12)
    facts["copy_gb_per_second"] = round(2 * 2**32 / seconds["copy"] / 1e9)
    facts["microseconds_a_launch"] = round(seconds["launches"] * 1e3, 2)
    bench.record.save()


# -- models ------------------------------------------------------------------------------------------------------------


def make_pair(name: str, size: Size) -> tuple[nn.Module, nn.Module]:
    """A cvit_* and its plain base architecture, in eval mode on the device."""
    torch.manual_seed(0)
    with device():  # weights are drawn there
        models = [timm.create_model(each, **size.model_args) for each in (name, BASES[name])]
    return tuple(model.eval().to(device(), dtype()) for model in models)


def make_images(model: nn.Module, batch: int) -> Tensor:
    return torch.randn(batch, *input_size(model), device=device(), dtype=dtype())


def collapsed_call(cvit: nn.Module, keep: float, images: Tensor, **given: Any) -> Callable[[], Tensor]:
    """A pass of the collapsed model at a keep."""

    def run() -> Tensor:
        cvit.keep = keep
        return cvit(images, **given)

    return run


def make_calls(cvit: nn.Module, plain: nn.Module, mergings: dict[float, nn.Module], images: Tensor, size: Size):
    """Variant -> a pass on the images."""
    calls = {PLAIN: lambda: plain(images)}
    for keep in size.keeps:
        cvit.keep = keep
        order = cvit.compute_order(images, upto=resolve_keep(keep, cvit.patch_embed.num_patches))
        calls[f"collapsed, keep {keep:g}"] = collapsed_call(cvit, keep, images)
        calls[f"given order, keep {keep:g}"] = collapsed_call(cvit, keep, images, order=order)
        if keep in mergings:
            merging = mergings[keep]
            calls[f"token merging, MACs of keep {keep:g}"] = lambda merging=merging: merging(images)
    return calls


def time_calls(calls: dict[str, Callable], batch: int, size: Size, bench: Bench, graph: bool = False) -> dict[str, Any]:
    """Variant -> images a second, timed in turn, and working memory; or why it failed."""
    found, ready = {}, {}
    for name, call in calls.items():
        found[name] = attempt(lambda call=call: {"memory": working_memory(call)})
        if graph and not failed(found[name]):
            ready[name] = attempt(lambda call=call: cuda_graph(call))
            if failed(ready[name]):
                found[name] = ready.pop(name)
        elif not failed(found[name]):
            ready[name] = call
    seconds = median_seconds(ready, size.runs, enough=lambda: bench.box.left <= 0)
    for name, taken in seconds.items():
        found[name]["images_per_second"] = batch / taken
    return found


def launches(call: Callable[[], object]) -> dict[str, int | None]:
    """Operations that compute, and kernels on the GPU; None where its profiler does not run."""
    kernels = attempt(lambda: count_kernels(call))
    return {"operations": count_launches(call), "kernels": None if failed(kernels) else kernels}
