"""The orders of a training set, made once, by all processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data import OrderTable, write_orders
from ..data.order_shards import is_whole
from ..data.units import MapUnits
from ..hub.save import weights_hash
from ..models import CollapseOrder, CoMAE
from ..order import Order
from .run import Run

SHARD_SIZE = 10_000  # images a file


def order_source(
    dataset: str,
    images: int | None,
    img_size: tuple[int, int],
    grid: tuple[int, int],
    name: str,
    orderer: CollapseOrder,
) -> dict[str, Any]:
    """What a folder of orders is of: it is only read for the same, and only completed with the same.

    Args:
        dataset: In words, see `describe_dataset`.
        images: Number of images; None for a stream.
        img_size: Height and width of the images that are ordered, in pixels.
        grid: Rows and columns of patches.
        name: Name of the orderer.
        orderer: Whose weights count, too.
    """
    settings = ""
    if orderer.baseline_name == "random":
        settings = f" seed {(orderer.generator or torch).initial_seed()}"
    elif isinstance(orderer.model, CoMAE):
        settings = f" {orderer.ranking} {orderer.damping:g}"
    if orderer.grid is not None and any(new > own for new, own in zip(grid, orderer.grid, strict=True)):
        settings += f" refine {orderer.refine:g}" if orderer.refine else f" spread {orderer.spread:g}"
    return {
        "dataset": dataset,
        "images": images,
        "img_size": tuple(img_size),
        "grid": tuple(grid),
        "orderer": Path(name).name + settings,
        "weights": weights_hash(orderer),
    }


def data_set_orders(
    run: Run,
    folder: str | Path,
    source: Mapping[str, Any],
    dataset,
    transform: Callable,
    orderer: CollapseOrder,
    compute: Callable[[Tensor], Order],
    mirrored: bool = True,
) -> OrderTable:
    """Read the folder of a data set's orders, which `timm-collapse order-dataset` makes, too; or make it.

    Every process orders its share of the images.

    Args:
        folder: The folder.
        source: See `order_source`; a folder of anything else is refused.
        dataset, transform: (PIL image, label); PIL image -> what `compute` takes.
        orderer: The module that orders.
        compute: Images (B, 3, H, W) -> Order.
        mirrored: The orders of the mirror images are needed.
    """
    accelerator = run.accelerator
    if not is_whole(folder):
        write_orders(
            folder, MapUnits(dataset, SHARD_SIZE), source, orderer, accelerator.autocast()(compute), transform,
            mirrored, precision=accelerator.mixed_precision, batch_size=128, workers=run.args.workers,
            device=accelerator.device, quiet=run.quiet or not run.is_main, rank=run.rank, world=run.world,
        )  # fmt: skip
    accelerator.wait_for_everyone()
    wanted = {**source, "mirrored": True} if mirrored else source
    return OrderTable.load(folder, wanted, dataset, quiet=run.quiet or not run.is_main)
