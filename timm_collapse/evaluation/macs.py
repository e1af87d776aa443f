"""Multiply-accumulates of a forward or backward pass, counted from the shapes of what it computes."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

aten = torch.ops.aten
Shape = tuple[int, ...]


def _attention(query: Shape, key: Shape, value: Shape, *args, **kwargs) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(gradient: Shape, query: Shape, key: Shape, value: Shape, *args, **kwargs) -> int:
    return sdpa_backward_flop_count(gradient, query, key, value)


def _matrix_vector(matrix: Shape, vector: Shape, *args, **kwargs) -> int:
    return 2 * prod(matrix)


def _added_matrix_vector(added: Shape, matrix: Shape, vector: Shape, *args, **kwargs) -> int:
    return 2 * prod(matrix)


def _cholesky(a: Shape, *args, **kwargs) -> int:
    return prod(a) * a[-1] // 3


def _solve_triangular(a: Shape, b: Shape, *args, left: bool = True, **kwargs) -> int:
    return prod(b) * a[-1]


def _solve(a: Shape, b: Shape, *args, **kwargs) -> int:
    columns = b[-1] if len(b) == len(a) else 1
    return 2 * prod(a) * a[-1] // 3 + 2 * prod(a) * columns


FORMULAS: dict[Any, Callable[..., int]] = {
    # FLOPs, twice the multiply-accumulates, of what PyTorch's own counter takes for nothing
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    aten._scaled_dot_product_fused_attention_overrideable: _attention,
    aten._scaled_dot_product_fused_attention_overrideable_backward: _attention_backward,
    aten.mv: _matrix_vector,
    aten.dot: _matrix_vector,
    aten.addmv: _added_matrix_vector,
    aten.linalg_cholesky_ex: _cholesky,
    aten.linalg_solve_triangular: _solve_triangular,
    aten._linalg_solve_ex: _solve,
}


class MacCounter(FlopCounterMode):
    """Counts the multiply-accumulates of what runs in its context, by every backend of attention alike.

    Counted are matrix products, convolutions, attention (both products, over all pairs of tokens also where a mask
    hides some), Cholesky factors and solves of linear systems, forward and backward. Not counted are element-wise
    operations, normalisation, softmax, sorting, gathering and resizing, nor what a compiled model computes.

    Attributes:
        macs: Of all that ran in the context, so far.
    """

    def __init__(self):
        super().__init__(display=False, custom_mapping=FORMULAS)

    @property
    def macs(self) -> int:
        return self.get_total_flops() // 2

    def __enter__(self):
        # the one kernel of nn.MultiheadAttention and nn.TransformerEncoderLayer in eval mode would count as nothing
        self._fast_path = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        return super().__enter__()

    def __exit__(self, *args):
        torch.backends.mha.set_fastpath_enabled(self._fast_path)
        return super().__exit__(*args)


@torch.no_grad()
def count_macs(function: Callable[[], object]) -> int:
    """Multiply-accumulates of one call, without gradients; see `MacCounter` for what counts."""
    with MacCounter() as counter:
        function()
    return counter.macs
