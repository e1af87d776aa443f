"""The command line: `timm-collapse COMMAND`, or `python -m timm_collapse COMMAND`.

A subcommand is a function from the parsed arguments, a function that declares them, and an entry of COMMANDS. What is
heavy is imported inside the functions, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from collections.abc import Callable, Sequence
from typing import NamedTuple

from . import evaluate, evaluate_generation, generate, latents, order_bank, order_dataset, publish

PIXELS_PER_PATCH = 16  # a grid of 14 x 14 stands for a photo of 224 x 224
MAX_GRID = 128
FIRST_PATCHES = 5  # of each image, in the printed table


class Command(NamedTuple):
    """A subcommand: what runs it, what declares its arguments, and what its --help says."""

    name: str
    run: Callable[[argparse.Namespace], None]
    declare: Callable[[argparse.ArgumentParser], None]
    summary: str
    description: str
    example: str


def declare_order(parser: argparse.ArgumentParser) -> None:
    """Arguments of `order`."""
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="photo files in any format that Pillow reads")
    parser.add_argument(
        "--model",
        default="collapse_ranker_tiny_224",
        help="orderer: a registered model, a local folder, a Hub id, or a baseline: random, raster, centre, halton, "
        "bayer, variance, gradient (default: %(default)s)",
    )
    parser.add_argument(
        "--keep",
        default="0.22",
        help="share of the patches to keep, in (0, 1], or a count of at least 2; 1 keeps all (default: %(default)s)",
    )
    parser.add_argument(
        "--grid",
        type=int,
        nargs=2,
        default=(14, 14),
        metavar=("ROWS", "COLUMNS"),
        help="patches of the photo, which is resized and centre-cropped to 16 pixels a patch (default: 14 14)",
    )
    parser.add_argument("--ranking", help="only for a CoMAE: pagerank, coverage, in_degree or transposed")
    parser.add_argument("--seed", type=_seed, default=0, help="of the baseline random (default: %(default)s)")
    parser.add_argument(
        "--out",
        default="order.png",
        metavar="PATH",
        help="the picture, .png, .pdf or .svg: one image gets its order, kept patches and ranks; several get a row of "
        "images over a row of kept patches (default: %(default)s)",
    )
    parser.add_argument(
        "--json",
        metavar="PATH",
        help="also write the rank of every patch, row by row, 0 = first; - writes them to stdout, and all else to "
        "stderr",
    )


def run_order(args: argparse.Namespace) -> None:
    """Orders the patches of photos, draws the orders and prints their first patches."""
    import torch

    from ..data.images import load_photo, photo_tensor
    from ..models.normalisation import Normalisation
    from ..order import CollapseError, check_grid, parse_keep, resolve_keep
    from ..plots import plot_kept, plot_order, save

    height, width = check_grid(tuple(args.grid))
    if max(height, width) > MAX_GRID:
        raise CollapseError(f"grid must have sides of at most {MAX_GRID} patches, got ({height}, {width})")
    keep = parse_keep(args.keep)
    kept = resolve_keep(keep, height * width)
    photos = []
    for path in args.images:
        photo = load_photo(path)
        if photo.height < height or photo.width < width:
            raise CollapseError(
                f"image: {path} has {photo.height} x {photo.width} pixels, too small for a grid of {height} x {width}"
            )
        photos.append(photo_tensor(photo, (PIXELS_PER_PATCH * height, PIXELS_PER_PATCH * width)))
    pixels = torch.stack(photos)

    orderer = _load_orderer(args.model, args.ranking, args.seed)
    order = orderer(Normalisation.of(orderer).apply(pixels), grid=(height, width))

    one = len(photos) == 1
    save(plot_order(pixels[0], order, keep) if one else plot_kept(pixels, order, keep), args.out)
    if args.json:
        ranks = [{"image": path, "ranks": row} for path, row in zip(args.images, order.ranks.tolist(), strict=True)]
        text = json.dumps({"model": args.model, "grid": [height, width], "kept": kept, "images": ranks})
        if args.json == "-":
            print(text)
        else:
            with open(args.json, "w", encoding="utf-8") as file:
                file.write(text + "\n")
    _print_order(args, order, kept)


def _load_orderer(name: str, ranking: str | None, seed: int):
    from ..models import CollapseOrder, CoMAE
    from ..order import BASELINES, RANKINGS, CollapseError

    if ranking is not None and ranking not in RANKINGS:
        raise CollapseError(f"ranking must be one of {', '.join(RANKINGS)}, got {ranking!r}")
    if name in BASELINES:
        orderer = CollapseOrder.baseline(name, seed=seed)
    else:
        orderer = CollapseOrder.from_pretrained(name, **({"ranking": ranking} if ranking else {}))
    if ranking is not None and not isinstance(orderer.model, CoMAE):
        raise CollapseError(f"ranking is for a CoMAE's dependency graph, which {name!r} does not have")
    return orderer


def _print_order(args: argparse.Namespace, order, kept: int) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Column, Table

    console = Console(stderr=args.json == "-", highlight=False)
    table = Table(Column("image", overflow="fold"), Column("first patches as (row, column)", no_wrap=True))
    for path, indices in zip(args.images, order.indices[:, :FIRST_PATCHES].tolist(), strict=True):
        # undecodable bytes of a file name cannot be printed as they are
        shown = path.encode("utf-8", "backslashreplace").decode()
        table.add_row(escape(shown), " ".join(f"({n // order.grid[1]}, {n % order.grid[1]})" for n in indices))
    console.print(table)
    console.print(f"kept {kept} of {order.num_patches} patches; picture: {escape(args.out)}", soft_wrap=True)


def declare_quickstart(parser: argparse.ArgumentParser) -> None:
    """Arguments of `quickstart`."""
    parser.add_argument(
        "--output", default="runs/quickstart", metavar="FOLDER", help="for models and pictures (default: %(default)s)"
    )
    parser.add_argument("--seed", type=_seed, default=0, help="of all trainings (default: %(default)s)")


def run_quickstart(args: argparse.Namespace) -> None:
    """Runs the whole way in miniature."""
    from ..quickstart import quickstart

    quickstart(args.output, args.seed)


COMMANDS = [
    Command(
        "quickstart",
        run_quickstart,
        declare_quickstart,
        summary="train, order and measure in miniature, offline",
        description="Trains a small CoMAE and a ranker on scikit-learn's digits, measures how much their orders leave "
        "unknown, and saves models and pictures. Needs no network and no GPU, and takes a few minutes.",
        example="timm-collapse quickstart --output runs/quickstart",
    ),
    Command(
        "evaluate",
        evaluate.run_evaluate,
        evaluate.declare_evaluate,
        summary="accuracy and speed of ViTs that see only the first patches",
        description=evaluate.DESCRIPTION,
        example=evaluate.EXAMPLE,
    ),
    Command(
        "generate",
        generate.run_generate,
        generate.declare_generate,
        summary="images of a generator, patch by patch along an order",
        description=generate.DESCRIPTION,
        example=generate.EXAMPLE,
    ),
    Command(
        "evaluate-generation",
        evaluate_generation.run,
        evaluate_generation.declare,
        summary="generated images against real ones",
        description=evaluate_generation.DESCRIPTION,
        example=evaluate_generation.EXAMPLE,
    ),
    Command(
        "order-dataset",
        order_dataset.run_order_dataset,
        order_dataset.declare_order_dataset,
        summary="the orders of a whole data set, by any number of processes",
        description=order_dataset.DESCRIPTION,
        example=order_dataset.EXAMPLE,
    ),
    Command(
        "order-bank",
        order_bank.run_bank,
        order_bank.declare_bank,
        summary="the orders of a data set by class, for a generator",
        description=order_bank.DESCRIPTION,
        example=order_bank.EXAMPLE,
    ),
    Command(
        "latents",
        latents.run_latents,
        latents.declare_latents,
        summary="the latents of a data set, to train a generator on",
        description=latents.DESCRIPTION,
        example=latents.EXAMPLE,
    ),
    Command(
        "publish",
        publish.run_publish,
        publish.declare_publish,
        summary="a trained model, its orderer and its card to the Hub",
        description=publish.DESCRIPTION,
        example=publish.EXAMPLE,
    ),
    Command(
        "order",
        run_order,
        declare_order,
        summary="order the patches of photos and draw the order",
        description="Orders the patches of each photo, those that tell most about the others first; saves a picture of "
        "the order and of the patches that are kept, and prints the first patches.",
        example="timm-collapse order photo.jpg --keep 0.22 --out order.png",
    ),
]


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line; the chosen Command is in `args.command`."""
    from .. import __version__

    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="timm-collapse",
        description="Patch collapse: which patches of an image explain the others.",
        epilog="example:\n  " + COMMANDS[-1].example,
        formatter_class=style,
    )
    parser.add_argument("--version", action="version", version=f"timm-collapse {__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in COMMANDS:
        subparser = subparsers.add_parser(
            command.name,
            help=command.summary,
            description=textwrap.fill(
                command.description, 80
            ),  # the style, which keeps the example's lines, wraps none
            epilog=f"example:\n  {command.example}",
            formatter_class=style,
        )
        command.declare(subparser)
        subparser.set_defaults(command=command)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        argv: Arguments without the program's name; those of the process by default.

    Returns:
        The exit code: 0, 2 for an error that one line on stderr explains, 130 after Ctrl-C.

    Raises:
        SystemExit: From argparse: 0 after --help and --version, 2 for arguments that it cannot parse.
    """
    args = build_parser().parse_args(argv)
    from ..order import CollapseError

    try:
        args.command.run(args)
    except (CollapseError, OSError) as error:
        print(f"timm-collapse: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _seed(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError(f"must be in [0, 2**32), got {text}")
    return value


_seed.__name__ = "int"  # what argparse calls a value that does not parse
