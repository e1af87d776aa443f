"""Tensors that depend on nothing but their arguments, made once for each device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .errors import values_readable

_kept: dict[tuple, Tensor] = {}
_LIMIT = 512  # tensors; a few bytes a patch each


def constant(make: Callable[..., Tensor], *args, device: torch.device) -> Tensor:
    """`make(*args)` on a device.

    Copying a tensor from the host to a GPU again in each forward pass waits for the GPU, and cannot be captured in a
    CUDA graph; so it is done once. While a graph is compiled, exported or traced, the tensor becomes part of the graph.

    Args:
        make: A function of the module level without side effects.
        args: Hashable.
        device: Where the result is used.

    Returns:
        The tensor; shared, so never change it in place.
    """
    # no fake tensor may be kept, and no kept one used among fake ones
    if not values_readable() or type(torch.empty(0, device=device)) is not Tensor:
        return make(*args).to(device)
    key = (make, args, device)
    value = _kept.get(key)
    if value is None:
        if len(_kept) >= _LIMIT:
            _kept.clear()
        with torch.inference_mode(False), torch.no_grad():
            value = _kept[key] = make(*args).to(device)
    return value
