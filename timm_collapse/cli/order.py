"""`timm-collapse order`: the orders of photos, as pictures and as numbers.

What is heavy is imported inside the functions, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from .common import PIXELS_PER_PATCH, add_orderer, add_seed, check_outputs, console, load_orderer, write_json

if TYPE_CHECKING:
    from torch import Tensor

    from ..order import Order

MAX_GRID = 128
FIRST_PATCHES = 5  # of each image, in the printed table
PHOTO_ORDERER = "collapse_ranker_tiny_224"  # photos are larger than the images of data sets and drafts

SUMMARY = "order the patches of photos and draw the order"
DESCRIPTION = (
    "Orders the patches of each photo, those that tell most about the others first; saves a picture of the order and "
    "of the patches that are kept, and prints the first patches."
)
EXAMPLE = "timm-collapse order photo.jpg --keep 0.22 --output order.png"


def declare(parser: argparse.ArgumentParser) -> None:
    """Arguments of `order`."""
    add = parser.add_argument
    # fmt: off
    add("images", nargs="+", metavar="IMAGE", help="photo files in any format that Pillow reads")
    add_orderer(parser, PHOTO_ORDERER)
    add("--keep", default="0.22",
        help="share of the patches to keep, in (0, 1], or a count of at least 2; 1 keeps all (default: %(default)s)")
    add("--grid", type=int, nargs=2, default=(14, 14), metavar=("ROWS", "COLUMNS"),
        help="patches of the photo, which is resized and centre-cropped to 16 pixels a patch (default: 14 14)")
    add_seed(parser, "the baseline random")
    add("--output", default="order.png", metavar="PATH",
        help="the picture, .png, .pdf or .svg: one image gets its order, kept patches and ranks; several get a row of "
        "images over a row of kept patches (default: %(default)s)")
    add("--json", metavar="PATH",
        help="also write the rank of every patch, row by row, 0 = first; - writes them to stdout, and all else to "
        "stderr")
    # fmt: on


def run(args: argparse.Namespace) -> None:
    """Orders the patches of photos, draws the orders and prints their first patches."""
    import torch

    from ..models.normalisation import Normalisation
    from ..order import CollapseError, check_grid, parse_keep, resolve_keep
    from ..plots import plot_kept, plot_order, save

    check_outputs(args, "json")
    height, width = check_grid(tuple(args.grid))
    if max(height, width) > MAX_GRID:
        raise CollapseError(f"--grid must have sides of at most {MAX_GRID} patches, got ({height}, {width})")
    keep = parse_keep(args.keep)
    kept = resolve_keep(keep, height * width)
    pixels = torch.stack([open_photo(path, height, width) for path in args.images])

    name = args.orderer or PHOTO_ORDERER
    orderer = load_orderer(name, args.ranking, args.seed)
    order = orderer(Normalisation.of(orderer).apply(pixels), grid=(height, width))

    save(plot_order(pixels[0], order, keep) if len(pixels) == 1 else plot_kept(pixels, order, keep), args.output)
    ranks = [{"image": path, "ranks": row} for path, row in zip(args.images, order.ranks.tolist(), strict=True)]
    found = {"orderer": name, "grid": [height, width], "kept": kept, "images": ranks}
    write_json(args.json, found, indent=None)
    _print(args, order, kept)


def open_photo(path: str, height: int, width: int) -> Tensor:
    """(3, H, W) in [0, 1], at 16 pixels a patch.

    Raises:
        CollapseError: No photo, or one with fewer pixels than patches.
    """
    from ..data.images import load_photo, photo_tensor
    from ..order import CollapseError

    photo = load_photo(path)
    if photo.height < height or photo.width < width:
        raise CollapseError(
            f"image: {path} has {photo.height} x {photo.width} pixels, too small for a grid of {height} x {width}"
        )
    return photo_tensor(photo, (PIXELS_PER_PATCH * height, PIXELS_PER_PATCH * width))


def _print(args: argparse.Namespace, order: Order, kept: int) -> None:
    from rich.markup import escape
    from rich.table import Column, Table

    table = Table(Column("image", overflow="fold"), Column("first patches as (row, column)", no_wrap=True))
    for path, indices in zip(args.images, order.indices[:, :FIRST_PATCHES].tolist(), strict=True):
        # undecodable bytes of a file name cannot be printed as they are
        shown = path.encode("utf-8", "backslashreplace").decode()
        table.add_row(escape(shown), " ".join(f"({n // order.grid[1]}, {n % order.grid[1]})" for n in indices))
    out = console(args)
    out.print(table)
    out.print(f"kept {kept} of {order.num_patches} patches; picture: {escape(args.output)}", soft_wrap=True)
