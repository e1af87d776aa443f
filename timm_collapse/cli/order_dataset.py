"""`timm-collapse order-dataset`: the orders of a whole data set, once, by any number of processes.

What is heavy is imported inside the functions, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import os
from datetime import timedelta
from typing import TYPE_CHECKING

from .common import add_data, add_ordering, check_numbers, open_device, open_ordering, worker_count

if TYPE_CHECKING:
    from accelerate import PartialState

SUMMARY = "the orders of a whole data set, by any number of processes"
DESCRIPTION = (
    "Orders the patches of all images of a data set and writes a folder of parquet files, from which train/cvit.py and "
    "train/cmar.py (--order_table) and order-bank (--order-table) read them. Any number of processes on any number of "
    "machines share the work, each image is ordered exactly once, and a stopped run goes on after its last whole file "
    "when it is started again, with as many processes as you like: the result is the same, bit for bit. Besides what "
    "the other commands open, --dataset takes tar files in webdataset's layout, which are read from front to back: a "
    "folder of them, or a pattern such as 'data/train-*.tar' or 'wds/data/train-{0000..0146}.tar' in quotes. Each row "
    "has the image's key (path, tar member without suffix, or index), its label, and the rank of every patch, row by "
    "row, 0 = first."
)
EXAMPLE = """timm-collapse order-dataset --dataset digits --grid 4 4 --output orders/digits

  8 GPUs, then a training along these orders:
  torchrun --nproc_per_node 8 -m timm_collapse order-dataset --dataset imagenet --orderer collapse_ranker_tiny_224 \\
      --precision bf16 --batch-size 256 --output orders/imagenet
  accelerate launch train/cvit.py --dataset imagenet --model cvit_small_patch16 --order_table orders/imagenet ...

  4 machines of 8 GPUs, on each of them (accelerate launch takes the same -m timm_collapse ...); --output must be a
  folder that all of them see:
  torchrun --nnodes 4 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 \\
      -m timm_collapse order-dataset --dataset 'wds/imagenet/train-{0000..0146}.tar' --output /shared/orders/imagenet

  2 processes on CPU:
  torchrun --nproc_per_node 2 -m timm_collapse order-dataset --dataset digits --grid 4 4 --output orders/digits"""


def declare(parser: argparse.ArgumentParser) -> None:
    """Arguments of `order-dataset`."""
    add_data(parser)
    add_ordering(parser, "patches of the orders, such as 14 14 (default: the orderer's)")
    add = parser.add_argument
    # fmt: off
    add("--shard-size", type=int, default=10_000, metavar="N",
        help="images a file, and a unit of work; tar files have one file each (default: %(default)s)")
    add("--output", required=True, metavar="FOLDER", help="where the files go, or the rest of them")
    # fmt: on


def run(args: argparse.Namespace) -> None:
    """Orders this process's share of the images; the main process then counts what all have written."""
    from ..data import check_orders, describe_dataset, eval_transform, open_units, write_orders
    from ..engine import order_source
    from ..evaluation.cost import autocast

    check_numbers(args, {"batch_size": 1, "workers": 0, "img_size": 1, "shard_size": 1})
    state = join_processes()
    device = open_device(args.device or str(state.device))
    units = open_units(args.dataset, args.split, args.part, args.shard_size)
    orderer, name, grid, size = open_ordering(args)
    orderer.to(device)
    dataset = describe_dataset(args.dataset, args.split, args.part)
    source = order_source(dataset, units.images, (size, size), grid, name, orderer)
    local = int(os.environ.get("LOCAL_WORLD_SIZE", state.num_processes))
    compute = autocast(device, args.precision)(lambda images: orderer(images, grid=grid))
    write_orders(
        args.output, units, source, orderer, compute,
        eval_transform(size, orderer.mean, orderer.std), args.mirror, args.precision, args.batch_size,
        worker_count(args, local), device, not state.is_main_process, state.process_index, state.num_processes,
    )  # fmt: skip
    state.wait_for_everyone()
    if state.is_main_process:
        found = check_orders(args.output)
        sides = ", mirrored" if args.mirror else ""
        print(f"orders of {found.images} images ({dataset}), {grid[0]} x {grid[1]} patches{sides}, by "
              f"{source['orderer']}: {found.files} files in {args.output}")  # fmt: skip
        counted = "as many as images" if units.images is not None else "as many as the tar files held"
        print(f"checked: {found.images} rows, {counted}; {found.keys} different keys")
        if found.repeated:
            print(f"note: keys such as {found.repeated!r} occur in several tar files, or several times in one")
    state.destroy_process_group()


def join_processes() -> PartialState:
    """The processes that accelerate launch or torchrun has started, or this one alone."""
    from accelerate import PartialState

    from ..engine.distributed import on_cpu, processes

    PartialState(cpu=on_cpu(), timeout=timedelta(days=1))  # at the end, one may wait long for another one's last file
    return processes()
