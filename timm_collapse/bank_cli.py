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

    from .data import DatasetInfo
    from .order import ClassOrderBank, Order

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


def declare_bank(parser: argparse.ArgumentParser) -> None:
    """Arguments of `order-bank`."""
    from .cli import _seed

    add = parser.add_argument
    # fmt: off
    add("--dataset", required=True, metavar="NAME",
        help="digits, a folder of parquet files, an image folder, or a timm data set such as hfds/<id>")
    add("--split", default="train", help="default: %(default)s")
    add("--part", default="", help="i/n takes the images with index = i modulo n, !i/n all the others (default: all)")
    add("--images", type=int, default=0, metavar="N", help="evenly spaced images of the split; 0 for all (default: 0)")
    add("--model",
        help="orderer: a registered model, a local folder, a Hub id, or a baseline: random, raster, centre, halton, "
        f"bayer, variance, gradient (default: {DEFAULT_MODEL})")
    add("--ranking", help="only for a CoMAE: pagerank, coverage, in_degree or transposed")
    add("--order-table", metavar="FILE",
        help="take the orders of this file, which train/cvit.py --order_table wrote for the same data, split and "
        "part, instead of computing them")
    add("--grid", type=int, nargs=2, metavar=("ROWS", "COLUMNS"),
        help="tokens of the generator, such as 16 16 (default: the orderer's or the file's)")
    add("--img-size", type=int, metavar="PIXELS",
        help="side that images are resized and centre-cropped to (default: the orderer's; 16 pixels a patch for a "
        "baseline)")
    add("--mirror", action=argparse.BooleanOptionalAction, default=True,
        help="the order of the mirror image is one of the class, too; for a generator that trains with mirroring "
        "(default: on)")
    add("--per-class", type=int, default=128, metavar="K",
        help="orders to keep of each class, a random sample; the means are of all (default: %(default)s)")
    add("--batch-size", type=int, default=64, help="default: %(default)s")
    add("--workers", type=int, help="processes that decode images (default: one a core, at most 4)")
    add("--precision", choices=("no", "bf16"), default="no", help="bf16 runs under autocast (default: %(default)s)")
    add("--device", help="such as cpu or cuda:1 (default: a GPU where there is one)")
    add("--seed", type=_seed, default=0, help="of the sample and of the baseline random (default: %(default)s)")
    add("--out", default="bank.safetensors", metavar="PATH", help="the bank (default: %(default)s)")
    add("--plot", metavar="PATH", help="also draw the mean order of up to 20 classes, .png, .pdf or .svg")
    # fmt: on


def run_bank(args: argparse.Namespace) -> None:
    """Builds a bank, saves it, draws it and says what it holds."""
    from .data import labels_of, open_dataset
    from .order import ClassOrderBank, CollapseError

    _check(args)
    info = open_dataset(args.dataset, args.split, args.part)
    if not len(info.dataset):
        raise CollapseError(f"dataset: {args.dataset!r} has no images of split {args.split!r}")
    orders, made_by = (table_orders if args.order_table else computed_orders)(args, info)
    classes = info.num_classes or int(labels_of(info.dataset).max()) + 1
    names = "+".join(Path(name).name for name in args.dataset.split("+"))  # the file travels, folders do not
    count = min(args.images or len(info.dataset), len(info.dataset))
    source = f"{names} {args.split} {args.part} {count} images{', mirrored' if args.mirror else ''}, by {made_by}"
    bank = ClassOrderBank.build(orders, classes, args.per_class, args.seed, source)
    bank.save(args.out)
    if args.plot:
        from .plots import save
        from .plots_generation import plot_bank

        save(plot_bank(bank), args.plot)
    _print(args, bank)


def computed_orders(args: argparse.Namespace, info: DatasetInfo) -> tuple[Iterator[tuple[Order, Tensor]], str]:
    """The orders of the images, as they are computed, and the orderer's name.

    Raises:
        CollapseError: An orderer that cannot be loaded, a ranking that it does not have, or a wrong grid or device.
    """
    from .cli import _load_orderer
    from .data import eval_transform
    from .evaluate_cli import _cores, _device
    from .evaluation import image_batches
    from .order import CollapseError, check_grid

    name = args.model or DEFAULT_MODEL
    orderer = _load_orderer(name, args.ranking, args.seed)
    device = _device(args.device)
    orderer.to(device)
    if args.grid is None and orderer.grid is None:
        raise CollapseError(f"--grid must be given for the baseline {name!r}")
    grid = check_grid(tuple(args.grid or orderer.grid))
    cfg = getattr(orderer.model, "pretrained_cfg", None) or {"input_size": (3, PIXELS_PER_PATCH * max(grid))}
    transform = eval_transform(args.img_size or cfg["input_size"][1], orderer.mean, orderer.std)
    workers = min(4, _cores()) if args.workers is None else args.workers
    batches = image_batches(info.dataset, transform, args.images, args.batch_size, workers)
    made_by = " ".join(filter(None, (Path(name).name, args.ranking)))
    return _ordered(batches, orderer, grid, args.mirror, args.precision, device), made_by


def _ordered(batches, orderer, grid, mirror, precision, device) -> Iterator[tuple[Order, Tensor]]:
    import torch
    from tqdm.auto import tqdm

    from .evaluation.cost import autocast

    for images, labels in tqdm(batches, desc="orders", unit="batch"):
        images = images.to(device, non_blocking=True)
        for view in (images, images.flip(-1)) if mirror else (images,):
            with torch.no_grad(), autocast(device, precision):
                order = orderer(view, grid=grid)
            yield order, labels


def table_orders(args: argparse.Namespace, info: DatasetInfo) -> tuple[Iterator[tuple[Order, Tensor]], str]:
    """The orders of a file, and what it says of them.

    Raises:
        CollapseError: The file is no order table, or one of another number of images.
        OSError: It cannot be read.
    """
    import torch
    from safetensors import SafetensorError, safe_open

    from .data import OrderTable, labels_of
    from .order import CollapseError, check_grid

    try:
        with safe_open(args.order_table, "pt") as file:
            source, tensors = (file.metadata() or {})["source"], list(file.keys())
        if tensors != ["ranks"]:  # a bank, say
            raise KeyError(f"it holds {', '.join(tensors)}")
        table = OrderTable.load(args.order_table, source)
    except (SafetensorError, KeyError) as error:
        raise CollapseError(f"--order-table: {args.order_table} is no table of orders: {error}") from error
    total = len(info.dataset)
    if table.ranks.shape[1] != total:
        raise CollapseError(
            f"--order-table: {args.order_table} has the orders of {table.ranks.shape[1]} images ({source}), the data "
            f"set has {total}"
        )
    grid = check_grid(tuple(args.grid or table.grid))
    count = min(args.images or total, total)
    chosen = torch.arange(count) * total // count  # as image_batches chooses them
    labels = torch.from_numpy(labels_of(info.dataset)).long()

    def orders() -> Iterator[tuple[Order, Tensor]]:
        for index in chosen.split(args.batch_size):
            for mirrored in (False, True) if args.mirror else (False,):
                yield table.lookup(index, torch.full_like(index, mirrored)).resample(grid), labels[index]

    return orders(), f"the table of {source}"


def _check(args: argparse.Namespace) -> None:
    """What would otherwise fail only after all orders are computed, or be ignored."""
    from .order import CollapseError
    from .plots import SUFFIXES

    for name, low in {"images": 0, "per_class": 1, "batch_size": 1, "workers": 0, "img_size": 1}.items():
        value = getattr(args, name)
        if value is not None and value < low:
            raise CollapseError(f"--{name.replace('_', '-')} must be at least {low}, got {value}")
    for name in ("model", "ranking", "img_size"):
        if args.order_table and getattr(args, name) is not None:
            raise CollapseError(f"--{name.replace('_', '-')} must not be given with --order-table, got "
                                f"{getattr(args, name)!r}: the file holds the orders")  # fmt: skip
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
