"""What a model costs: multiply-accumulates, measured throughput and memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..order import CollapseError
from .macs import count_macs


class Cost(NamedTuple):
    """Of one model at one keep: multiply-accumulates an image, and measured images a second, order included."""

    macs: float
    images_per_second: float


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Context of a precision: "no" for fp32, "bf16"; CollapseError for another."""
    if precision not in ("no", "bf16"):
        raise CollapseError(f"precision must be no or bf16, got {precision!r}")
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def clock(function: Callable[[], Any]) -> tuple[Any, float]:
    """The result of a call and the seconds that it took, to the end of what it started on a GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result, time.perf_counter() - start


@torch.no_grad()
def median_seconds(
    functions: Mapping[str, Callable[[], object]],
    runs: int = 7,
    warm_ups: int = 1,
    enough: Callable[[], bool] = lambda: False,
) -> dict[str, float]:
    """Median seconds of several functions, timed in turn so that a drifting machine treats them alike.

    Args:
        functions: Name -> a call.
        runs: Timed runs of each.
        warm_ups: Turns before them that do not count.
        enough: Asked after each timed turn: whether to stop before all runs are done.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for run in range(-warm_ups, runs):
        for name, function in functions.items():
            _, taken = clock(function)
            if run >= 0:
                seconds[name].append(taken)
        if run >= 0 and enough():
            break
    return {name: statistics.median(values) for name, values in seconds.items()}


def images_per_second(functions: dict[str, Callable[[], object]], batch_size: int, runs: int = 7) -> dict[str, float]:
    """Median throughput of several functions, timed in turn.

    Args:
        functions: Name -> a call that processes one batch.
        batch_size: Images in a batch.
        runs: Timed runs of each, after one warm-up.
    """
    return {name: batch_size / taken for name, taken in median_seconds(functions, runs).items()}


@torch.no_grad()
def working_memory(function: Callable[[], object]) -> int | None:
    """Bytes of GPU memory that a call takes at its peak, beyond what is held before it; None without a GPU."""
    if not torch.cuda.is_available():
        function()
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@torch.no_grad()
def cuda_graph(function: Callable[[], object], warm_ups: int = 3) -> Callable[[], None]:
    """A call recorded as a CUDA graph; what is returned replays it on the same tensors.

    Raises:
        RuntimeError: The call reads a value back from the GPU, or does else what a graph cannot hold.
    """
    current, stream = torch.cuda.current_stream(), torch.cuda.Stream()
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        for _ in range(warm_ups):
            function()
        torch.cuda.set_sync_debug_mode("error")  # what waits for the GPU is found here: a broken capture does harm
        try:
            function()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    current.wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            function()
    finally:
        torch.cuda.set_stream(current)  # a broken capture leaves its own
    return graph.replay


@torch.no_grad()
def costs_over_keep(
    models: Mapping[str, nn.Module], images: Tensor, keeps: Sequence[float], runs: int = 3, precision: str = "no"
) -> dict[str, list[Cost]]:
    """Cost of several models at several keeps, all timed in turn; each call makes its own order.

    Args:
        models: Name -> collapsed model; a model without `keep` is measured at 1.0 alone. On the device of the images,
            and in eval mode.
        images: (B, 3, H, W); their content does not matter.
        keeps: Ratios in (0, 1], descending.
        runs: Timed runs, at least 1.
        precision: "no" or "bf16", as for `accuracy_curves`.

    Returns:
        Name -> a `Cost` for each keep.
    """

    def call(model: nn.Module, keep: float | None) -> Callable[[], object]:
        def run() -> object:
            if keep is not None:
                model.keep = keep
            return model(images)

        return run

    calls = {name: [call(m, k) for k in (keeps if hasattr(m, "keep") else [None])] for name, m in models.items()}
    before = {name: getattr(model, "keep", None) for name, model in models.items()}
    try:
        with autocast(images.device, precision):
            macs = {name: [count_macs(each) / len(images) for each in row] for name, row in calls.items()}
            flat = {f"{name}\n{i}": each for name, row in calls.items() for i, each in enumerate(row)}
            speeds = images_per_second(flat, len(images), runs)
    finally:
        for name, keep in before.items():
            if keep is not None:
                models[name].keep = keep
    return {name: [Cost(row[i], speeds[f"{name}\n{i}"]) for i in range(len(row))] for name, row in macs.items()}
