"""Speed of collapsed ViTs, order included, beside the plain ViT and token merging at its cost and as published.

python benchmarks/cvit_speed.py --batch-sizes 1 8 16 64
python benchmarks/cvit_speed.py --models vit_small_patch16_224 --keeps 0.22 0.5 --devices cuda --compile
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from token_merging import TokenMerging, input_size, merging_for_macs
from torch import nn

import timm_collapse  # noqa: F401  (registers the models)
from timm_collapse import CollapseError
from timm_collapse.evaluation import count_macs, images_per_second, with_orderer
from timm_collapse.evaluation.cost import autocast
from timm_collapse.evaluation.report import RESULTS, markdown_table, write_section

PRECISIONS = {"fp32": "no", "bf16": "bf16"}
PLAIN = "plain"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    gpu = ["cuda"] if torch.cuda.is_available() else []
    parser.add_argument("--models", nargs="+", default=["vit_base_patch16_224"], help="timm names, random weights")
    parser.add_argument("--model-args", nargs="*", default=[], metavar="NAME=INT", help="for smaller models: depth=2")
    parser.add_argument("--orderer", default="collapse_ranker_tiny_224")
    parser.add_argument("--keeps", type=float, nargs="+", default=[0.22])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 16, 64])
    parser.add_argument("--devices", nargs="+", default=[*gpu, "cpu"])
    parser.add_argument("--precisions", nargs="+", choices=list(PRECISIONS), default=list(PRECISIONS))
    parser.add_argument("--published-r", type=int, default=16, help="merges in each block, as published for ViT-B/16")
    parser.add_argument("--runs", type=int, default=7, help="timed runs of each, in turn; the median counts")
    parser.add_argument("--compile", action="store_true", help="torch.compile every variant")
    parser.add_argument("--name", default="cvit_speed", help="section of the results page and name of the JSON file")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the page (default: %(default)s)")
    return parser.parse_args()


@torch.no_grad()
def main() -> None:
    args = parse()
    tables, data = [], {}
    for name in args.models:
        options = {key: int(value) for key, value in (each.split("=") for each in args.model_args)}
        torch.manual_seed(0)
        plain = timm.create_model(name, **options).eval()
        for keep in args.keeps:
            if not 0 < keep < 1:
                raise CollapseError(f"keeps must be in (0, 1), as 1.0 is measured anyway, got {keep}")
            variants, macs = make_variants(plain, args.orderer, keep, args.published_r)
            speeds = {}
            for device in args.devices:
                for precision in args.precisions:
                    found = {
                        batch: time_variants(variants, plain, device, precision, batch, args.runs, args.compile)
                        for batch in args.batch_sizes
                    }
                    speeds[f"{device} {precision}"] = found
                    heading = f"{name}, keep {keep:g}, {device} {precision}{', compiled' if args.compile else ''}"
                    tables.append(f"**{heading}**\n\n{markdown_table(make_rows(macs, found))}")
                    print(tables[-1], end="\n\n", flush=True)
            data[f"{name} {keep:g}"] = {"macs": macs, "images_per_second": speeds}
    text = (
        f"End to end, images a second (times the plain model's), by batch size; order included, pre-processing "
        f"excluded. Orderer {args.orderer}; bf16 is autocast; median of {args.runs} runs in turn; "
        f"{torch.get_num_threads()} CPU threads; random weights (the cost does not depend on them). Token merging is "
        f"our own small implementation of ToMe; at equal MACs its merges are chosen so that it costs what the "
        f"collapsed model costs, order included.\n\n" + "\n\n".join(tables)
    )
    write_section(args.name, "Speed of collapsed ViTs", text, {"batch_sizes": args.batch_sizes, **data}, args.results)


def make_variants(
    plain: nn.Module, orderer: str, keep: float, published_r: int
) -> tuple[dict[str, tuple[nn.Module, float | None]], dict[str, float]]:
    """What is compared, with shared weights.

    Returns:
        Name -> (module, its keep or None), the plain model first; and name -> multiply-accumulates of an image.
    """
    collapsed = with_orderer(plain, orderer)
    cheap = f"collapsed, keep {keep:g}"
    variants: dict[str, tuple[nn.Module, float | None]] = {
        PLAIN: (plain, None),
        "collapsed, keep 1": (collapsed, 1.0),
        cheap: (collapsed, keep),
    }
    image = torch.randn(1, *input_size(plain))
    macs = {name: count_macs(call(model, at, image)) for name, (model, at) in variants.items()}
    if isinstance(plain, VisionTransformer):
        published = TokenMerging(plain, published_r).eval()
        merging = {f"token merging, r = {published_r}": (published, count_macs(call(published, None, image)))}
        equal, count = merging_for_macs(plain, macs[cheap])
        near = "equal" if abs(count / macs[cheap] - 1) < 0.02 else "nearest"  # few merges left: none is equal
        span = f"{equal.r[-1]}" if equal.r[0] == equal.r[-1] else f"{equal.r[-1]} to {equal.r[0]}"
        merging[f"token merging, {near} MACs (r = {span})"] = equal, count
        for name, (model, count) in merging.items():
            variants[name], macs[name] = (model, None), count
    return variants, macs


def time_variants(
    variants: dict[str, tuple[nn.Module, float | None]],
    plain: nn.Module,
    device: str,
    precision: str,
    batch: int,
    runs: int,
    compiled: bool,
) -> dict[str, float]:
    """Name -> images a second, timed in turn on one random batch."""
    images = torch.randn(batch, *input_size(plain), device=device)
    calls = {}
    torch.compiler.reset()  # graphs of other shapes would count towards the limit of recompilations
    for name, (model, keep) in variants.items():
        model.to(device)
        calls[name] = call(torch.compile(model) if compiled else model, keep, images, model)
    with autocast(torch.device(device), PRECISIONS[precision]):
        return images_per_second(calls, batch, runs)


def call(
    model: Callable[..., Any], keep: float | None, images: torch.Tensor, owner: nn.Module | None = None
) -> Callable[[], object]:
    """A call on a batch that first sets the keep of the model (of the `owner`, where the model is compiled)."""

    def run() -> object:
        if keep is not None:
            (owner or model).keep = keep
        return model(images)

    return run


def make_rows(macs: dict[str, float], found: dict[int, dict[str, float]]) -> list[dict[str, str]]:
    """One row a variant: GMACs, and images a second with their ratio to the plain model's at each batch size."""
    rows = []
    for name, count in macs.items():
        row = {"model": name, "GMACs an image": f"{count / 1e9:.2f} ({count / macs[PLAIN]:.2f}x)"}
        for batch, speeds in found.items():
            row[f"batch {batch}"] = f"{speeds[name]:.1f} ({speeds[name] / speeds[PLAIN]:.2f}x)"
        rows.append(row)
    return rows


if __name__ == "__main__":
    main()
