"""Computing in full precision where autocast is on."""

from __future__ import annotations

import torch
from torch import Tensor


def without_autocast(tensor: Tensor) -> torch.autocast:
    """Context in which what is computed from a tensor keeps the precision of the operands.

    The meta device knows no autocast at all; there the context is that of CPUs.
    """
    return torch.autocast("cpu" if tensor.is_meta else tensor.device.type, enabled=False)
