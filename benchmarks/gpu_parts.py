"""What `gpu.py` measures, part by part: all that is here runs in processes of their own, on the GPU where there is one.

All models have random weights, on which no cost depends; the orderers are the bundled ones that each `cvit_*` takes.
"""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import long_sequences
import timm
import torch
from gpu_runner import Bench, Task, attempt, failed
from mar_speed import make_plan, samplers
from token_merging import input_size, merging_for_macs
from torch import Tensor, nn

import timm_collapse  # noqa: F401  (registers the models)
from timm_collapse.collapse.cvit import BASES
from timm_collapse.evaluation import count_kernels, count_launches, count_macs, median_seconds
from timm_collapse.evaluation.cost import autocast, clock, cuda_graph, working_memory
from timm_collapse.evaluation.report import hardware
from timm_collapse.order import resolve_keep

PLAIN, EAGER, GRAPH = "plain", "eager", "CUDA graph"
GUIDANCE = 3.0  # of generation: both conditions are computed
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


# -- speed -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def speed(name: str, graph: bool, size: Size, bench: Bench) -> None:
    """One model, collapsed and with merged tokens: MACs, launches, then speed and memory; or speed as CUDA graphs."""
    cvit, plain = make_pair(name, size)
    image, macs, mergings = make_images(plain, 1), {}, {}

    def count() -> dict[str, float]:
        macs[PLAIN] = count_macs(lambda: plain(image))
        for keep in size.keeps:
            macs[f"collapsed, keep {keep:g}"] = cost = count_macs(collapsed_call(cvit, keep, image))
            mergings[keep], merged = merging_for_macs(plain, cost)
            macs[f"token merging, MACs of keep {keep:g}"] = merged
        return macs

    def launches() -> dict[str, dict[str, int | None]]:
        calls = make_calls(cvit, plain, mergings, make_images(plain, min(CHECKED_BATCH, max(size.batches))), size)
        return {each: {"operations": count_launches(call), "kernels": count_kernels(call)}
                for each, call in calls.items()}  # fmt: skip

    bench.measure(f"{name} / MACs", count)
    if not graph:
        bench.measure(f"{name} / launches", launches)
    broken: set[str] = set()
    for batch in size.batches:

        def timed(batch: int = batch) -> dict[str, Any]:
            calls = make_calls(cvit, plain, mergings, make_images(plain, batch), size)
            calls = {each: call for each, call in calls.items() if each not in broken}
            found = time_calls(calls, batch, size, bench, graph)
            broken.update(each for each, value in found.items() if graph and failed(value))  # at any batch size
            return found

        bench.measure(f"{name} / {GRAPH if graph else EAGER} / {batch}", timed)


# -- the order alone ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def order(size: Size, bench: Bench) -> None:
    """Every orderer that the models take by default, alone: MACs, launches, speed and memory by how much is ordered."""
    known = {}
    for name in size.models:
        cvit, _ = make_pair(name, size)
        known.setdefault(cvit.orderer.source or str(cvit.orderer), cvit)
    for name, cvit in known.items():
        number, grid = cvit.patch_embed.num_patches, cvit.patch_embed.grid_size
        counts = {f"first {keep:.0%}": resolve_keep(keep, number) for keep in size.keeps} | {"all": number}

        def calls(batch: int, cvit=cvit, counts=counts, grid=grid) -> dict[str, Callable]:
            images = make_images(cvit, batch).float()
            return {each: lambda upto=upto: cvit.orderer(images, grid, upto, check=False).indices
                    for each, upto in counts.items()}  # fmt: skip

        def costs(calls=calls) -> dict[str, dict[str, int | None]]:
            one, some = calls(1), calls(min(CHECKED_BATCH, max(size.batches)))
            return {each: {"macs": count_macs(one[each]), "operations": count_launches(some[each]),
                           "kernels": count_kernels(some[each])} for each in one}  # fmt: skip

        bench.measure(f"{name} / cost", costs)
        for mode in (EAGER, GRAPH) if device().type == "cuda" else (EAGER,):
            for batch in size.batches:

                def timed(batch: int = batch, graph: bool = mode == GRAPH, calls=calls) -> dict[str, Any]:
                    return time_calls(calls(batch), batch, size, bench, graph)

                bench.measure(f"{name} / {mode} / {batch}", timed)


# -- torch.compile -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def compiled(name: str, variant: str, mode: str, size: Size, bench: Bench) -> None:
    """One compiled model: seconds to its first answer and to that of another keep, graphs, agreement, speed."""
    torch._dynamo.config.recompile_limit = 64  # a graph for each keep and batch size
    cvit, plain = make_pair(name, size)
    model = plain if variant == PLAIN else cvit
    options = {} if size.backend != "inductor" or mode == "default" else {"mode": mode}
    fast = torch.compile(model, fullgraph=True, dynamic=False, backend=size.backend, **options)
    label = f"{name} / {variant} / {mode}"
    checked = min(CHECKED_BATCH, max(size.batches))
    keeps = (1.0,) if variant == PLAIN else size.keeps
    first = None
    for keep in keeps:
        images = make_images(plain, checked)
        cvit.keep = keep

        def answer(images: Tensor = images) -> dict[str, Any]:
            expected = model(images).float()
            before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
            found, seconds = clock(lambda: fast(images).float().clone())
            error = (found - expected).norm(dim=1) / expected.norm(dim=1)
            graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"] - before
            agreement = {"median_difference": float(error.median()), "largest_difference": float(error.max())}
            return {"seconds": seconds, "graphs": graphs, **agreement}

        found = bench.measure(f"{label} / {keep:g} / first answer", answer, needs=first or 0.0)
        if found is None or failed(found):
            return
        first = first or found["seconds"]
    for batch in sorted(size.batches, key=lambda each: each != checked):  # what is compiled already comes first
        for keep in keeps:
            cvit.keep = keep
            images = make_images(plain, batch)
            calls = {"eager": lambda images=images: model(images), "compiled": lambda images=images: fast(images)}
            needs = 0.0 if batch == checked else first
            bench.measure(
                f"{label} / {keep:g} / {batch}",
                lambda calls=calls, batch=batch: time_calls(calls, batch, size, bench),
                needs=needs,
            )


# -- generation --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def mar(size: Size, bench: Bench) -> None:
    """MAR by the literal published loop and by the fast sampler, on the same weights, orders and noise."""
    torch.manual_seed(0)
    with device():
        model = timm.create_model(size.mar, num_sampling_steps=size.diffusion_steps).eval()
    with autocast(device(), "bf16" if device().type == "cuda" else "no"):
        for warm in samplers(model, make_plan(model, size.mar_batch, 2, GUIDANCE)).values():
            attempt(warm)
        calls = samplers(model, make_plan(model, size.mar_batch, size.mar_steps, GUIDANCE))
        seconds: dict[str, list[float]] = {name: [] for name in calls}

        def timed(name: str) -> dict[str, Any]:
            memory = working_memory(lambda: seconds[name].append(clock(calls[name])[1]))
            speed = size.mar_batch / statistics.median(seconds[name])
            return {"images_per_second": speed, "memory": memory, "runs": len(seconds[name])}

        for turn in range(3):
            if turn and bench.box.left < 1.2 * sum(each[-1] for each in seconds.values() if each):
                return
            for name in reversed(calls):  # the literal loop last: it takes longest
                bench.measure(name, lambda name=name: timed(name))


# -- long sequences ----------------------------------------------------------------------------------------------------


def long(size: Size, bench: Bench) -> None:
    """Patches of one pixel: a forward pass and a training step, order included, and the order alone."""
    precision = "bf16" if device().type == "cuda" else "no"
    runs = 5 if device().type == "cuda" else 1

    def measured(keep: float, train: bool) -> dict[str, float]:
        return long_sequences.forward(size.long_model, keep, train, size.long_side, 1, precision, runs)

    for keep in size.long_keeps:
        bench.measure(f"forward, keep {keep:g}", lambda keep=keep: measured(keep, False))
        bench.measure(f"training step, keep {keep:g}", lambda keep=keep: measured(keep, True))
    bench.measure("forward, keep 1", lambda: measured(1.0, False))  # what it is to be compared with


def tasks(part: str, size: Size, gpu: bool) -> list[Task]:
    """The processes of a part, the most telling ones first; `gpu` says whether there is one, as this must not ask."""
    if part == "speed":
        modes = (False, True) if gpu else (False,)
        chosen = [(name, graph) for graph in modes for name in size.models]
        return [Task(f"{name}, {GRAPH if graph else EAGER}", partial(speed, name, graph, size), 1 / (len(chosen) - i))
                for i, (name, graph) in enumerate(chosen)]  # fmt: skip
    if part == "order":
        return [Task("all orderers", partial(order, size))]
    if part == "compile":
        least = 10.0 if size.backend == "inductor" else 0.0
        chosen = [(name, variant, mode) for name in size.models for mode in size.modes
                  for variant in ("collapsed", PLAIN)]  # fmt: skip
        return [Task(", ".join(each), partial(compiled, *each, size), 0.7, least) for each in chosen]
    if part == "mar":
        return [Task("generation", partial(mar, size))]
    return [Task("long sequences", partial(long, size))]
