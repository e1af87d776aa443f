"""The orders of a training set, made once for all processes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import nn

from ..data import OrderTable
from ..hub import weights_hash
from ..models.transformer import use_plain_attention
from .run import Run


def data_set_orders(
    run: Run, path: str | Path, described: str, dataset, transform: Callable, orderer: nn.Module, compute: Callable
) -> OrderTable:
    """Read the file of a data set's orders, or make it; the first process makes it for all.

    Args:
        path: The file.
        described: Data set, image size and orderer in words; with the hash of the orderer's weights, a file made of
            anything else is refused.
        dataset, transform: (PIL image, label); PIL image -> what `compute` takes.
        orderer: The module that orders.
        compute: Images (B, 3, H, W) -> Order.
    """
    source = f"{described} {weights_hash(orderer)}"
    if run.is_main and not Path(path).exists():
        device = run.accelerator.device
        if device.type == "cpu":
            use_plain_attention(orderer)
        with run.accelerator.autocast():
            table = OrderTable.build(compute, dataset, transform, source, device=device, quiet=run.quiet)
        table.save(path)
    run.accelerator.wait_for_everyone()
    return OrderTable.load(path, source)
