"""`timm-collapse order-bank`: the orders of a data set by class, for a generator to take its order from.

What is heavy is imported inside the functions, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from ..models import CollapseOrder
    from ..order import ClassOrderBank, Order

DEFAULT_MODEL = "collapse_ranker_tiny"
PIXELS_PER_PATCH = 16  # of the images that a baseline sees

DESCRIPTION = (
    "Orders the patches of the images of a data set and keeps what a generator needs: a sample of the orders of each "
    "class and the mean of all of them. A class-conditional generator then fills its grid in the order of its class."
)
EXAMPLE = """timm-collapse order-bank --dataset imagenet --grid 16 16 --precision bf16 \\
      --out bank.safetensors --plot bank.png

  where imagenet/train/ is a folder of class folders; --images 50000 takes an even sample of it.

  offline, in seconds:
  timm-collapse order-bank --dataset digits --grid 4 4 --out digits.safetensors --plot digits.png"""


def declare_data(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Arguments that name the images."""
    add = parser.add_argument
    # fmt: off
    add("--dataset", required=required, metavar="NAME",
        help="digits, a folder of parquet files, an image folder, or a timm data set such as hfds/<id>; a+b joins")
    add("--split", default="train", help="default: %(default)s")
    add("--part", default="", help="i/n takes the images with index = i modulo n, !i/n all the others (default: all)")
    # fmt: on


def declare_orderer(parser: argparse.ArgumentParser, grid: str) -> None:
    """Arguments of the orderer and how it is run; `grid` says what --grid is."""
    from .main import _seed

    add = parser.add_argument
    # fmt: off
    add("--model",
        help="orderer: a registered model, a local folder, a Hub id, or a baseline: random, raster, centre, halton, "
        f"bayer, variance, gradient (default: {DEFAULT_MODEL})")
    add("--ranking", help="only for a CoMAE: pagerank, coverage, in_degree or transposed")
    add("--grid", type=int, nargs=2, metavar=("ROWS", "COLUMNS"), help=grid)
    add("--img-size", type=int, metavar="PIXELS",
        help="side that images are resized and centre-cropped to (default: the orderer's; 16 pixels a patch for a "
        "baseline)")
    add("--mirror", action=argparse.BooleanOptionalAction, default=True,
        help="order the mirror images, too; for models that are trained with mirroring (default: on)")
    add("--batch-size", type=int, default=64, help="default: %(default)s")
    add("--workers", type=int, help="processes that decode images (default: one a core, at most 4)")
    add("--precision", choices=("no", "bf16"), default="no", help="bf16 runs under autocast (default: %(default)s)")
    add("--device", help="such as cpu or cuda:1 (default: a GPU where there is one)")
    add("--seed", type=_seed, default=0, help="of all that is drawn, as by the baseline random (default: %(default)s)")
    # fmt: on


def declare_bank(parser: argparse.ArgumentParser) -> None:
    """Arguments of `order-bank`."""
    declare_data(parser, required=False)
    add = parser.add_argument
    # fmt: off
    add("--images", type=int, default=0, metavar="N", help="evenly spaced images of the split; 0 for all (default: 0)")
    add("--order-table", metavar="FOLDER",
        help="take the orders of this folder, which timm-collapse order-dataset or a train script's --order_table "
        "wrote, instead of computing them; --dataset, if given, must be what they are of")
    declare_orderer(parser, "tokens of the generator, such as 16 16 (default: the orderer's or the folder's)")
    add("--per-class", type=int, default=128, metavar="K",
        help="orders to keep of each class, a random sample; the means are of all (default: %(default)s)")
    add("--out", default="bank.safetensors", metavar="PATH", help="the bank (default: %(default)s)")
    add("--plot", metavar="PATH", help="also draw the mean order of up to 20 classes, .png, .pdf or .svg")
    # fmt: on


def run_bank(args: argparse.Namespace) -> None:
    """Builds a bank, saves it, draws it and says what it holds."""
    from ..order import ClassOrderBank

    _check(args)
    orders, classes, source = (table_orders if args.order_table else computed_orders)(args)
    bank = ClassOrderBank.build(orders, classes, args.per_class, args.seed, source)
    bank.save(args.out)
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
    from .evaluate import _device

    info = open_dataset(args.dataset, args.split, args.part, labelled=True)
    total = len(info.dataset)
    device = _device(args.device)
    name, orderer, grid, size = load_orderer(args)
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


def load_orderer(args: argparse.Namespace) -> tuple[str, CollapseOrder, tuple[int, int], int]:
    """Name and orderer of `declare_orderer`'s arguments, the grid, and the side of the images in pixels.

    Raises:
        CollapseError: An orderer that cannot be loaded, a ranking that it does not have, or a wrong grid.
    """
    from ..order import CollapseError, check_grid
    from .main import _load_orderer

    name = args.model or DEFAULT_MODEL
    orderer = _load_orderer(name, args.ranking, args.seed)
    if args.grid is None and orderer.grid is None:
        raise CollapseError(f"--grid must be given for the baseline {name!r}")
    grid = check_grid(tuple(args.grid or orderer.grid))
    cfg = getattr(orderer.model, "pretrained_cfg", None) or {"input_size": (3, PIXELS_PER_PATCH * max(grid))}
    return name, orderer, grid, args.img_size or cfg["input_size"][1]


def worker_count(args: argparse.Namespace, processes: int = 1) -> int:
    """Processes that decode images for each of the `processes` of this machine."""
    from .evaluate import _cores

    return max(1, min(4, _cores() // processes)) if args.workers is None else args.workers


def check_numbers(args: argparse.Namespace, least: dict[str, int]) -> None:
    """Refuses arguments that are given and below their least value."""
    from ..order import CollapseError

    for name, low in least.items():
        value = getattr(args, name)
        if value is not None and value < low:
            raise CollapseError(f"--{name.replace('_', '-')} must be at least {low}, got {value}")


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
    from ..plots.style import SUFFIXES

    check_numbers(args, {"images": 0, "per_class": 1, "batch_size": 1, "workers": 0, "img_size": 1})
    if not (args.dataset or args.order_table):
        raise CollapseError("--dataset must be given, or --order-table")
    for name in ("model", "ranking", "img_size"):
        if args.order_table and getattr(args, name) is not None:
            raise CollapseError(f"--{name.replace('_', '-')} must not be given with --order-table, got "
                                f"{getattr(args, name)!r}: the folder holds the orders")  # fmt: skip
    if args.plot and Path(args.plot).suffix.lower() not in SUFFIXES:
        raise CollapseError(f"--plot must end in {', '.join(SUFFIXES)}, got {args.plot!r}")
    for path in filter(None, (args.out, args.plot)):
        if not Path(path).parent.is_dir():
            raise CollapseError(f"path: the folder {str(Path(path).parent)!r} does not exist")


def _print(args: argparse.Namespace, bank: ClassOrderBank) -> None:
    from rich.console import Console
    from rich.markup import escape

    console = Console(highlight=False)
    held = bank.counts[bank.seen > 0]
    empty = bank.num_classes - len(held)
    console.print(
        f"{int(bank.seen.sum())} orders of {bank.grid[0]} x {bank.grid[1]} patches, {len(held)} classes"
        + (f" ({empty} more have no images)" if empty else "")
        + f", {int(held.min())} to {int(held.max())} orders held of each"
    )
    size = Path(args.out).stat().st_size / 1e3
    picture = f"; picture: {escape(args.plot)}" if args.plot else ""
    console.print(f"bank: {escape(args.out)} ({size:,.0f} kB){picture}", soft_wrap=True)
