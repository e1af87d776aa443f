"""`timm-collapse order-bank`: the orders of a data set by class, for a generator to take its order from.

What is heavy is imported inside the functions, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from .common import (
    add_data,
    add_ordering,
    check_numbers,
    check_outputs,
    console,
    open_device,
    open_ordering,
    option,
    worker_count,
)

if TYPE_CHECKING:
    from torch import Tensor

    from ..order import ClassOrderBank, Order

SUMMARY = "the orders of a data set by class, for a generator"
DESCRIPTION = (
    "Orders the patches of the images of a data set and keeps what a generator needs: a sample of the orders of each "
    "class and the mean of all of them. A class-conditional generator then fills its grid in the order of its class."
)
EXAMPLE = """timm-collapse order-bank --dataset imagenet --grid 16 16 --precision bf16 \\
      --output bank.safetensors --plot bank.png

  where imagenet/train/ is a folder of class folders; --images 50000 takes an even sample of it.

  offline, in seconds:
  timm-collapse order-bank --dataset digits --grid 4 4 --output digits.safetensors --plot digits.png"""


def declare(parser: argparse.ArgumentParser) -> None:
    """Arguments of `order-bank`."""
    add_data(parser, required=False)
    add = parser.add_argument
    # fmt: off
    add("--images", type=int, default=0, metavar="N", help="evenly spaced images of the split; 0 for all (default: 0)")
    add("--order-table", metavar="FOLDER",
        help="take the orders of this folder, which timm-collapse order-dataset or a train script's --order_table "
        "wrote, instead of computing them; --dataset, if given, must be what they are of")
    add_ordering(parser, "tokens of the generator, such as 16 16 (default: the orderer's or the folder's)")
    add("--per-class", type=int, default=128, metavar="K",
        help="orders to keep of each class, a random sample; the means are of all (default: %(default)s)")
    add("--output", default="bank.safetensors", metavar="PATH", help="the bank (default: %(default)s)")
    add("--plot", metavar="PATH", help="also draw the mean order of up to 20 classes, .png, .pdf or .svg")
    # fmt: on


def run(args: argparse.Namespace) -> None:
    """Builds a bank, saves it, draws it and says what it holds."""
    from ..order import ClassOrderBank

    _check(args)
    orders, classes, source = (table_orders if args.order_table else computed_orders)(args)
    bank = ClassOrderBank.build(orders, classes, args.per_class, args.seed, source)
    bank.save(args.output)
    if args.plot:
        from ..plots import plot_bank, save

        save(plot_bank(bank), args.plot)
    _print(args, bank)


def computed_orders(args: argparse.Namespace) -> tuple[Iterator[tuple[Order, Tensor]], int, str]:
    """The orders of the images, as they are computed, with their labels; the number of classes; what they are of.

    Raises:
        CollapseError: No images, an orderer that cannot be loaded, a ranking that it does not have, or a wrong grid or
            device.
    """
    from ..data import describe_dataset, eval_transform, open_dataset
    from ..evaluation import image_batches

    info = open_dataset(args.dataset, args.split, args.part, labelled=True)
    total = len(info.dataset)
    device = open_device(args.device)
    orderer, name, grid, size = open_ordering(args)
    orderer.to(device)
    transform = eval_transform(size, orderer.mean, orderer.std)
    batches = image_batches(info.dataset, transform, args.images, args.batch_size, worker_count(args))
    orders = _ordered(batches, orderer, grid, args.mirror, args.precision, device)
    made_by = " ".join(filter(None, (Path(name).name, args.ranking)))
    dataset = describe_dataset(args.dataset, args.split, args.part)
    return orders, info.num_classes, _source(args, dataset, total, made_by)


def _source(args: argparse.Namespace, dataset: str, total: int, made_by: str) -> str:
    count = min(args.images or total, total)
    return f"{dataset}, {count} images{', mirrored' if args.mirror else ''}, by {made_by}"


def _ordered(batches, orderer, grid, mirror, precision, device) -> Iterator[tuple[Order, Tensor]]:
    import torch
    from tqdm.auto import tqdm

    from ..evaluation.cost import autocast

    for images, labels in tqdm(batches, desc="orders", unit="batch"):
        images = images.to(device, non_blocking=True)
        for view in (images, images.flip(-1)) if mirror else (images,):
            with torch.no_grad(), autocast(device, precision):
                order = orderer(view, grid=grid)
            yield order, labels


def table_orders(args: argparse.Namespace) -> tuple[Iterator[tuple[Order, Tensor]], int, str]:
    """The orders of a folder with their labels; the number of classes; what they are of.

    Raises:
        CollapseError: It is no folder of orders, one of other images, or one without labels or mirror images.
    """
    import torch

    from ..data import OrderTable, open_dataset
    from ..order import CollapseError, check_grid

    info = open_dataset(args.dataset, args.split, args.part) if args.dataset else None
    table = OrderTable.load(args.order_table, {"mirrored": True} if args.mirror else {}, info and info.dataset)
    labels, total = table.labels.long(), len(table)
    if labels.min() < 0:
        raise CollapseError(f"--order-table: {args.order_table} has images without a label, so no bank of classes")
    grid = check_grid(tuple(args.grid or table.grid))
    count = min(args.images or total, total)
    chosen = torch.arange(count) * total // count  # as image_batches chooses them

    def orders() -> Iterator[tuple[Order, Tensor]]:
        for index in chosen.split(args.batch_size):
            for mirrored in (False, True) if args.mirror else (False,):
                yield table.lookup(index, torch.full_like(index, mirrored)).resample(grid), labels[index]

    classes = (info.num_classes if info else 0) or int(labels.max()) + 1
    return orders(), classes, _source(args, table.layout["dataset"], total, table.layout["orderer"])


def _check(args: argparse.Namespace) -> None:
    """What would otherwise fail only after all orders are computed, or be ignored."""
    from ..order import CollapseError

    check_numbers(args, {"images": 0, "per_class": 1, "batch_size": 1, "workers": 0, "img_size": 1})
    if not (args.dataset or args.order_table):
        raise CollapseError("--dataset must be given, or --order-table")
    for name in ("orderer", "ranking", "img_size"):
        if args.order_table and getattr(args, name) is not None:
            raise CollapseError(f"{option(name)} must not be given with --order-table, got {getattr(args, name)!r}: "
                                "the folder holds the orders")  # fmt: skip
    check_outputs(args, "output", pictures=("plot",))


def _print(args: argparse.Namespace, bank: ClassOrderBank) -> None:
    from rich.markup import escape

    out = console(args)
    held = bank.counts[bank.seen > 0]
    empty = bank.num_classes - len(held)
    out.print(
        f"{int(bank.seen.sum())} orders of {bank.grid[0]} x {bank.grid[1]} patches, {len(held)} classes"
        + (f" ({empty} more have no images)" if empty else "")
        + f", {int(held.min())} to {int(held.max())} orders held of each"
    )
    size = Path(args.output).stat().st_size / 1e3
    picture = f"; picture: {escape(args.plot)}" if args.plot else ""
    out.print(f"bank: {escape(args.output)} ({size:,.0f} kB){picture}", soft_wrap=True)
