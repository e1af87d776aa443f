"""What the commands share: arguments that several have, and the checks, devices and models behind them.

What is heavy is imported inside the functions, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch
    from rich.console import Console
    from torch import nn

    from ..models import CollapseOrder

PIXELS_PER_PATCH = 16  # of the images that a baseline sees: a grid of 14 x 14 stands for a photo of 224 x 224
MAX_WORKERS = 4
DEFAULT_ORDERER = "collapse_ranker_tiny"  # of data sets and drafts

ORDERERS = (
    "a registered orderer, a local folder, a Hub id, or a baseline: random, raster, centre, halton, bayer, variance, "
    "gradient"
)
CLASSIFIERS = "any timm name with its tag, hf-hub:<id>, or a local folder that save_for_hf wrote"
DATASETS = "digits, a folder of parquet files, an image folder, or a timm data set such as hfds/<id>"


def seed_number(text: str) -> int:
    """The type of --seed."""
    value = int(text)
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError(f"must be in [0, 2**32), got {text}")
    return value


seed_number.__name__ = "int"  # what argparse calls a value that does not parse


def add_seed(parser: argparse.ArgumentParser, of: str) -> None:
    """--seed, and what it is the seed of."""
    parser.add_argument("--seed", type=seed_number, default=0, help=f"of {of} (default: %(default)s)")


def add_device(parser: argparse.ArgumentParser) -> None:
    """--device."""
    parser.add_argument("--device", help="such as cpu or cuda:1 (default: a GPU where there is one)")


def add_precision(parser: argparse.ArgumentParser) -> None:
    """--precision of a network that only looks at images."""
    parser.add_argument(
        "--precision", choices=("no", "bf16"), default="no", help="bf16 runs under autocast (default: %(default)s)"
    )


def add_batches(parser: argparse.ArgumentParser) -> None:
    """--batch-size and --workers of a data set that is read once."""
    parser.add_argument("--batch-size", type=int, default=64, help="default: %(default)s")
    parser.add_argument(
        "--workers", type=int, help=f"processes that decode images (default: one a core, at most {MAX_WORKERS})"
    )


def add_data(parser: argparse.ArgumentParser, required: bool = True, more: str = "") -> None:
    """--dataset, --split and --part of a data set of which something is written."""
    add = parser.add_argument
    add("--dataset", required=required, metavar="NAME", help=f"{DATASETS}; a+b joins{more}")
    add("--split", default="train", help="default: %(default)s")
    add("--part", default="", help="i/n takes the images with index = i modulo n, !i/n all the others (default: all)")


def add_orderer(parser: argparse.ArgumentParser, default: str) -> None:
    """--orderer, None where the default is meant, and --ranking."""
    parser.add_argument("--orderer", metavar="NAME", help=f"{ORDERERS} (default: {default})")
    parser.add_argument("--ranking", help="only for a CoMAE: pagerank, coverage, in_degree or transposed")


def add_ordering(parser: argparse.ArgumentParser, grid: str) -> None:
    """Arguments of a data set's ordering; `grid` says what --grid is."""
    add = parser.add_argument
    add_orderer(parser, DEFAULT_ORDERER)
    # fmt: off
    add("--grid", type=int, nargs=2, metavar=("ROWS", "COLUMNS"), help=grid)
    add("--img-size", type=int, metavar="PIXELS",
        help="side that images are resized and centre-cropped to (default: the orderer's; 16 pixels a patch for a "
        "baseline)")
    add("--mirror", action=argparse.BooleanOptionalAction, default=True,
        help="order the mirror images, too; for models that are trained with mirroring (default: on)")
    # fmt: on
    add_batches(parser)
    add_precision(parser)
    add_device(parser)
    add_seed(parser, "all that is drawn, as by the baseline random")


def option(name: str) -> str:
    """The option of an argument: --img-size of img_size."""
    return "--" + name.replace("_", "-")


def check_numbers(args: argparse.Namespace, least: dict[str, float]) -> None:
    """Refuses numbers that are given and below their least value, or not finite."""
    from ..order import CollapseError

    for name, low in least.items():
        value = getattr(args, name)
        if value is not None and not low <= value < float("inf"):
            finite = " and finite" if isinstance(value, float) else ""
            raise CollapseError(f"{option(name)} must be at least {low}{finite}, got {value}")


def check_outputs(args: argparse.Namespace, *files: str, pictures: tuple[str, ...] = ("output",)) -> None:
    """Refuses what could not be written after a long run.

    Args:
        files, pictures: Names of arguments that are paths, None, or "-" for stdout.
    """
    from ..order import CollapseError
    from ..plots.style import SUFFIXES

    for name in (*pictures, *files):
        path = getattr(args, name)
        if path is None or path == "-":
            continue
        if name in pictures and Path(path).suffix.lower() not in SUFFIXES:
            raise CollapseError(f"{option(name)} must end in {', '.join(SUFFIXES)}, got {path!r}")
        if not Path(path).parent.is_dir():
            raise CollapseError(f"{option(name)}: the folder {str(Path(path).parent)!r} does not exist")


def write_json(path: str | None, data: dict[str, Any], indent: int | None = 1) -> None:
    """Writes the numbers of --json, to stdout for "-"."""
    if path is not None:
        text = json.dumps(data, indent=indent)
        print(text) if path == "-" else Path(path).write_text(text + "\n", encoding="utf-8")


def console(args: argparse.Namespace) -> Console:
    """Where tables go: stderr where stdout is for --json."""
    from rich.console import Console

    return Console(stderr=getattr(args, "json", None) == "-", highlight=False)


def open_device(name: str | None) -> torch.device:
    """The device of --device, or why there is none."""
    import torch

    from ..order import CollapseError

    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise CollapseError(f"--device: {name!r} cannot be used: {str(error).splitlines()[0]}") from error
    return device


def worker_count(args: argparse.Namespace, processes: int = 1) -> int:
    """Processes that decode images for each of the `processes` of this machine."""
    if args.workers is not None:
        return args.workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(MAX_WORKERS, cores // processes))


def load_orderer(name: str, ranking: str | None = None, seed: int = 0) -> CollapseOrder:
    """The orderer of --orderer.

    Args:
        name: A baseline, or what `CollapseOrder.from_pretrained` finds.
        ranking: Of a CoMAE's graph; None for what was saved with it.
        seed: Of the baseline random.

    Raises:
        CollapseError: Nothing of that name, or a ranking that it does not have.
    """
    from ..models import CollapseOrder, CoMAE
    from ..order import BASELINES, RANKINGS, CollapseError

    if ranking is not None and ranking not in RANKINGS:
        raise CollapseError(f"--ranking must be one of {', '.join(RANKINGS)}, got {ranking!r}")
    if name in BASELINES:
        orderer = CollapseOrder.baseline(name, seed=seed)
    else:
        try:
            orderer = CollapseOrder.from_pretrained(name, **({"ranking": ranking} if ranking else {}))
        except CollapseError as error:
            raise CollapseError(f"--orderer: {str(error).removeprefix('name: ')}") from error
    if ranking is not None and not isinstance(orderer.model, CoMAE):
        raise CollapseError(f"--ranking is for a CoMAE's dependency graph, which {name!r} does not have")
    return orderer


class Ordering(NamedTuple):
    """How a data set is ordered: the orderer, its name, the grid, and the side of the images in pixels."""

    orderer: CollapseOrder
    name: str
    grid: tuple[int, int]
    img_size: int


def open_ordering(args: argparse.Namespace) -> Ordering:
    """What `add_ordering`'s arguments say.

    Raises:
        CollapseError: An orderer that cannot be loaded, a ranking that it does not have, or a wrong grid.
    """
    from ..order import CollapseError, check_grid

    name = args.orderer or DEFAULT_ORDERER
    orderer = load_orderer(name, args.ranking, args.seed)
    if args.grid is None and orderer.grid is None:
        raise CollapseError(f"--grid must be given for the baseline {name!r}")
    grid = check_grid(tuple(args.grid or orderer.grid))
    cfg = getattr(orderer.model, "pretrained_cfg", None) or {"input_size": (3, PIXELS_PER_PATCH * max(grid))}
    return Ordering(orderer, name, grid, args.img_size or cfg["input_size"][1])


def load_classifier(name: str, argument: str, pretrained: bool = True, **kwargs: Any) -> nn.Module:
    """A timm classifier in eval mode.

    Args:
        name: A registered model, a local folder (with or without `local-dir:`), or `hf-hub:` and an id.
        argument: What the user gave the name as.
        kwargs: For `timm.create_model`.

    Raises:
        CollapseError: Nothing of that name, or no classifier.
    """
    from ..models.registry import load_model
    from ..order import CollapseError

    model = load_model(name, argument, pretrained, **kwargs)
    if not getattr(model, "num_classes", 0):
        raise CollapseError(f"{argument}: {name!r} is no classifier: it has 0 classes")
    return model
