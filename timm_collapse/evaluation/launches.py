"""Kernel launches: what a pass of many small operations costs on a GPU, however few its multiply-accumulates are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

NO_KERNEL = {
    # new names or new memory, nothing computed; views are known by their schemas
    "aten::_unsafe_view",
    "aten::_reshape_alias",
    "aten::detach",
    "aten::empty.memory_format",
    "aten::empty_like",
    "aten::empty_strided",
    "aten::lift_fresh",
    "aten::new_empty",
    "aten::new_empty_strided",
    "aten::promote_types",
    "aten::sym_size.int",
}


class LaunchCounter(TorchDispatchMode):
    """Counts the operations of its context that compute: on a GPU each is at least one kernel launch.

    Counted are calls of aten operations, forward and backward, but for views and new memory. An operation may launch
    several kernels (a sort does), so this is a lower bound that every machine and every device counts alike;
    `count_kernels` counts what a GPU runs. What a compiled model launches is not seen.

    Attributes:
        launches: Of all that ran in the context, so far.
    """

    def __init__(self):
        super().__init__()
        self.launches = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None) -> Any:
        returns = function._schema.returns
        view = any(value.alias_info is not None and not value.alias_info.is_write for value in returns)
        self.launches += not view and function.name() not in NO_KERNEL
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def count_launches(function: Callable[[], object]) -> int:
    """Operations of one call that compute, without gradients; see `LaunchCounter`."""
    with LaunchCounter() as counter:
        function()
    return counter.launches


@torch.no_grad()
def count_kernels(function: Callable[[], object]) -> int | None:
    """Kernels, copies and fills that one call runs on the GPU, as the profiler sees them; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    function()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        function()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profiler.events())
