"""Speed of collapsed ViTs, order included, beside the plain ViT, an order for nothing, and token merging.

python benchmarks/cvit_speed.py --models vit_base_patch16_224 vit_small_patch16_224 vit_tiny_patch16_224
python benchmarks/cvit_speed.py --busy 2 --name cvit_speed_busy  # beside two processes that use the CPU
python benchmarks/cvit_speed.py --models vit_small_patch16_224 --keeps 0.22 0.5 --devices cuda --compile
"""

from __future__ import annotations

import argparse
import copy
import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from token_merging import TokenMerging, input_size, merging_for_macs
from torch import nn

import timm_collapse  # noqa: F401  (registers the models)
from timm_collapse import CollapseError, Order, collapse
from timm_collapse.collapse import default_orderer
from timm_collapse.evaluation import count_macs, images_per_second, with_orderer
from timm_collapse.evaluation.cost import autocast
from timm_collapse.evaluation.report import RESULTS, markdown_table, write_section

PRECISIONS = {"fp32": "no", "bf16": "bf16"}
PLAIN = "plain"


class Variant(NamedTuple):
    """What is timed: a model, the keep that it runs at if it has one, and whether its order is made beforehand."""

    model: nn.Module
    keep: float | None = None
    given: bool = False


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    gpu = ["cuda"] if torch.cuda.is_available() else []
    parser.add_argument("--models", nargs="+", default=["vit_base_patch16_224"], help="timm names, random weights")
    parser.add_argument("--model-args", nargs="*", default=[], metavar="NAME=INT", help="for smaller models: depth=2")
    parser.add_argument("--orderer", default="", help="default: that of the cvit_* models")
    parser.add_argument("--keeps", type=float, nargs="+", default=[0.22])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 16, 64])
    parser.add_argument("--devices", nargs="+", default=[*gpu, "cpu"])
    parser.add_argument("--precisions", nargs="+", choices=list(PRECISIONS), default=list(PRECISIONS))
    parser.add_argument("--published-r", type=int, default=16, help="merges in each block, as published for ViT-B/16")
    parser.add_argument("--runs", type=int, default=7, help="timed runs of each, in turn; the median counts")
    parser.add_argument("--compile", action="store_true", help="torch.compile every variant")
    parser.add_argument("--busy", type=int, default=0, help="processes that multiply matrices all the while")
    parser.add_argument("--name", default="cvit_speed", help="section of the results page and name of the JSON file")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the page (default: %(default)s)")
    return parser.parse_args()


@torch.no_grad()
def main() -> None:
    args = parse()
    with busy(args.busy):
        measure(args)


def measure(args: argparse.Namespace) -> None:
    tables, data = [], {}
    for name in args.models:
        options = {key: int(value) for key, value in (each.split("=") for each in args.model_args)}
        torch.manual_seed(0)
        plain = timm.create_model(name, **options).eval()
        orderers = tuple(args.orderer or default_orderer(remainder) for remainder in (None, "none"))
        for keep in args.keeps:
            if not 0 < keep < 1:
                raise CollapseError(f"keeps must be in (0, 1), as 1.0 is measured anyway, got {keep}")
            variants, macs = make_variants(plain, orderers, keep, args.published_r)
            speeds = {}
            for device in args.devices:
                for precision in args.precisions:
                    found = {
                        batch: time_variants(variants, plain, device, precision, batch, args.runs, args.compile)
                        for batch in args.batch_sizes
                    }
                    speeds[f"{device} {precision}"] = found
                    heading = f"{name}, keep {keep:g}, {device} {precision}{', compiled' if args.compile else ''}"
                    by = f"orderer {orderers[0]}, without remainder {orderers[1]}"
                    tables.append(f"**{heading}**, {by}\n\n{markdown_table(make_rows(macs, found, keep))}")
                    print(tables[-1], end="\n\n", flush=True)
            data[f"{name} {keep:g}"] = {"macs": macs, "images_per_second": speeds}
    beside = f", beside {args.busy} processes that multiply matrices all the while" if args.busy else ""
    text = (
        f"End to end, images a second (times the plain model's), by batch size; order included, pre-processing "
        f"excluded. bf16 is autocast; median of {args.runs} runs in turn; {torch.get_num_threads()} CPU threads"
        f"{beside}; random weights (the cost does not depend on them). The share of the ideal is what the order leaves "
        f"of the speed with an order that was made beforehand. Token merging is our own small implementation of ToMe; "
        f"at equal MACs its merges are chosen so that it costs what the collapsed model costs, order included.\n\n"
        + "\n\n".join(tables)
    )
    title = "Speed of collapsed ViTs" + (" on a busy machine" if args.busy else "")
    write_section(args.name, title, text, {"batch_sizes": args.batch_sizes, **data}, args.results)


@contextmanager
def busy(count: int) -> Iterator[None]:
    """So many processes that use one core each, until the block ends."""
    processes = [multiprocessing.get_context("spawn").Process(target=multiply, daemon=True) for _ in range(count)]
    for process in processes:
        process.start()
    try:
        yield
    finally:
        for process in processes:
            process.kill()


def multiply() -> None:
    torch.set_num_threads(1)
    matrix = torch.randn(512, 512)
    while True:
        torch.mm(matrix, matrix)


def make_variants(
    plain: nn.Module, orderers: tuple[str, str], keep: float, published_r: int
) -> tuple[dict[str, Variant], dict[str, float]]:
    """What is compared, with shared weights; by orderers for the default remainder and for none.

    Returns:
        Name -> variant, the plain model first; and name -> multiply-accumulates of an image.
    """
    collapsed = collapse(copy.deepcopy(plain), orderers[0])
    cheap, given = (f"{kind}, keep {keep:g}" for kind in ("collapsed", "given order"))
    variants = {
        PLAIN: Variant(plain),
        "collapsed, keep 1": Variant(collapsed, 1.0),
        cheap: Variant(collapsed, keep),
        given: Variant(collapsed, keep, given=True),
        f"{cheap}, no remainder": Variant(with_orderer(plain, orderers[1]), keep),
    }
    image = torch.randn(1, *input_size(plain))
    macs = {name: count_macs(call(variant, image)) for name, variant in variants.items()}
    if isinstance(plain, VisionTransformer):
        published = TokenMerging(plain, published_r).eval()
        merging = {f"token merging, r = {published_r}": (published, count_macs(lambda: published(image)))}
        equal, count = merging_for_macs(plain, macs[cheap])
        near = "equal" if abs(count / macs[cheap] - 1) < 0.02 else "nearest"  # few merges left: none is equal
        span = f"{equal.r[-1]}" if equal.r[0] == equal.r[-1] else f"{equal.r[-1]} to {equal.r[0]}"
        merging[f"token merging, {near} MACs (r = {span})"] = equal, count
        for name, (model, count) in merging.items():
            variants[name], macs[name] = Variant(model), count
    return variants, macs


def time_variants(
    variants: dict[str, Variant], plain: nn.Module, device: str, precision: str, batch: int, runs: int, compiled: bool
) -> dict[str, float]:
    """Name -> images a second, timed in turn on one random batch."""
    images = torch.randn(batch, *input_size(plain), device=device)
    torch.compiler.reset()  # graphs of other shapes would count towards the limit of recompilations
    calls = {}
    for name, variant in variants.items():
        variant.model.to(device)
        calls[name] = call(variant, images, torch.compile(variant.model) if compiled else None)
    with autocast(torch.device(device), PRECISIONS[precision]):
        return images_per_second(calls, batch, runs)


def call(variant: Variant, images: torch.Tensor, compiled: Callable[..., Any] | None = None) -> Callable[[], object]:
    """A call on a batch that first sets the keep of the model."""
    model, keep, _ = variant
    order: dict[str, Order] = {}
    if variant.given:
        order["order"] = model.compute_order(images)

    def run() -> object:
        if keep is not None:
            model.keep = keep
        return (compiled or model)(images, **order)

    return run


def make_rows(macs: dict[str, float], found: dict[int, dict[str, float]], keep: float) -> list[dict[str, str]]:
    """A row for each variant: GMACs, images a second with their ratio to the plain model; shares of the ideal last."""
    rows = []
    for name, count in macs.items():
        row = {"model": name, "GMACs an image": f"{count / 1e9:.2f} ({count / macs[PLAIN]:.2f}x)"}
        for batch, speeds in found.items():
            row[f"batch {batch}"] = f"{speeds[name]:.1f} ({speeds[name] / speeds[PLAIN]:.2f}x)"
        rows.append(row)
    shares = {
        f"batch {batch}": f"{speeds[f'collapsed, keep {keep:g}'] / speeds[f'given order, keep {keep:g}']:.0%}"
        for batch, speeds in found.items()
    }
    return [*rows, {"model": "share of the ideal", "GMACs an image": "", **shares}]


if __name__ == "__main__":
    main()
