"""What a model costs: multiply-accumulates and measured throughput."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


@torch.no_grad()
def count_macs(function: Callable[[], object]) -> int:
    """Multiply-accumulates of matrix products, convolutions and attention in one call (PyTorch's FLOP counter / 2)."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops() // 2


@torch.no_grad()
def images_per_second(functions: dict[str, Callable[[], object]], batch_size: int, runs: int = 7) -> dict[str, float]:
    """Median throughput of several functions, timed in turn so that a drifting machine treats them alike.

    Args:
        functions: Name -> a call that processes one batch.
        batch_size: Images in a batch.
        runs: Timed runs of each, after one warm-up.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for run in range(runs + 1):
        for name, function in functions.items():
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            start = time.perf_counter()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if run:
                seconds[name].append(time.perf_counter() - start)
    return {name: batch_size / sorted(values)[len(values) // 2] for name, values in seconds.items()}
