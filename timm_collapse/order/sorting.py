"""Sorting whose result does not depend on the device: equal values keep their order."""

from __future__ import annotations

import torch
from torch import Tensor


def stable_sort(values: Tensor, descending: bool = False) -> tuple[Tensor, Tensor]:
    """Every row (B, N) sorted, and the places (B, N) long that its values had; equal values keep their order."""
    if torch.onnx.is_in_onnx_export():
        return values.sort(dim=1, descending=descending)  # becomes TopK, which is stable
    return values.sort(dim=1, descending=descending, stable=True)


def stable_argsort(values: Tensor, descending: bool = False) -> Tensor:
    """(B, N) long: argsort of every row; equal values keep their order."""
    return stable_sort(values, descending)[1]


def inverted(permutations: Tensor) -> Tensor:
    """(B, N) long: the inverse of every row; turns indices into ranks and back."""
    positions = torch.arange(permutations.shape[1], device=permutations.device).expand_as(permutations)
    return torch.empty_like(permutations).scatter_(1, permutations, positions)
