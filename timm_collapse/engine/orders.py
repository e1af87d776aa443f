"""The orders of a training set, made once, by all processes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data import OrderTable, describe_dataset, write_orders
from ..data.order_shards import is_whole
from ..data.units import MapUnits
from ..hub.save import weights_hash
from ..models import CollapseOrder
from ..order import Order
from .args import TrainArgs
from .distributed import processes

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
    return {
        "dataset": dataset,
        "images": images,
        "img_size": tuple(img_size),
        "grid": tuple(grid),
        "orderer": f"{Path(name).name} {orderer.describe(grid)}".strip(),
        "weights": weights_hash(orderer),
    }


def data_set_orders(
    args: TrainArgs,
    folder: str | Path,
    name: str,
    orderer: CollapseOrder,
    dataset,
    transform: Callable,
    img_size: tuple[int, int],
    grid: tuple[int, int],
    compute: Callable[[Tensor], Order] | None = None,
    mirrored: bool = True,
) -> OrderTable:
    """Read the folder of a training set's orders, which `timm-collapse order-dataset` makes, too; or make it.

    Every process orders its share of the images.

    Args:
        args: The script's: which data set this is, precision, workers.
        folder: The folder; one of another data set, orderer or grid is refused.
        name, orderer: Who orders; moves to this process's device.
        dataset, transform: (PIL image, label); PIL image -> what `compute` takes.
        img_size: Height and width of the images that are ordered, in pixels.
        grid: Rows and columns of patches.
        compute: Images (B, 3, H, W) -> Order on the grid; None: the orderer itself.
        mirrored: The orders of the mirror images are needed.
    """
    state, compute = processes(), compute or partial(orderer, grid=grid)
    quiet = args.dry_run or not state.is_main_process
    described = describe_dataset(args.dataset, args.split, args.part)
    source = order_source(described, len(dataset), img_size, grid, name, orderer)
    if not is_whole(folder):
        dtype = torch.float16 if args.precision == "fp16" else torch.bfloat16
        autocast = torch.autocast(state.device.type, dtype, enabled=args.precision != "no")
        write_orders(
            folder, MapUnits(dataset, SHARD_SIZE), source, orderer.to(state.device), autocast(compute), transform,
            mirrored, precision=args.precision, batch_size=128, workers=args.workers, device=state.device, quiet=quiet,
            rank=state.process_index, world=state.num_processes,
        )  # fmt: skip
    state.wait_for_everyone()
    wanted = {**source, "mirrored": True} if mirrored else source
    return OrderTable.load(folder, wanted, dataset, quiet=quiet)
