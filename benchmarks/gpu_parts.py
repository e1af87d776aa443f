"""What `gpu.py` measures, part by part: all of it in processes of their own, on the GPU where there is one."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import long_sequences
import timm
import torch
from gpu_models import (
    CHECKED_BATCH,
    EAGER,
    GRAPH,
    PLAIN,
    Size,
    collapsed_call,
    device,
    launches,
    make_calls,
    make_images,
    make_pair,
    time_calls,
)
from gpu_runner import Bench, Task, attempt, failed
from mar_speed import make_plan, samplers
from token_merging import merging_for_macs
from torch import Tensor

from timm_collapse.evaluation import count_macs
from timm_collapse.evaluation.cost import autocast, clock, working_memory
from timm_collapse.order import resolve_keep

GUIDANCE = 3.0  # of generation: both conditions are computed


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

    def counted() -> dict[str, dict[str, int | None]]:
        images = make_images(plain, min(CHECKED_BATCH, max(size.batches)))
        return {each: launches(call) for each, call in make_calls(cvit, plain, mergings, images, size).items()}

    bench.measure(f"{name} / MACs", count)
    if not graph:
        bench.measure(f"{name} / launches", counted)
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
            return {each: {"macs": count_macs(one[each]), **launches(some[each])} for each in one}

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
