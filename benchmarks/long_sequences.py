"""Patches down to one pixel: time and peak memory of a forward pass, of the order, and of PageRank at 50,176 patches.

    python benchmarks/long_sequences.py --name cpu --model cvit_base_patch1 --keep 1.0 0.22 0.05 --precision bf16

Every figure is of a process of its own, so that its peak memory is its own. Figures that docs/ has of the same model,
precision and batch are kept, unless --again is given: all patches of cvit_base_patch1 take a quarter of an hour.
"""

from __future__ import annotations

import argparse
import json
import resource
import signal
import statistics
import subprocess
import sys

import timm
import torch

import timm_collapse  # noqa: F401  (registers the models)
from timm_collapse import CollapseOrder, Order, pagerank
from timm_collapse.evaluation.cost import autocast, clock
from timm_collapse.evaluation.report import RESULTS, hardware, markdown_table, write_section
from timm_collapse.models.refine import hierarchical_dependency
from timm_collapse.order import HierarchicalGraph, hierarchical_pagerank, spearman

GIB = 2**30
OUT_OF_MEMORY = 77  # status of a process that measures
SIDE = 224


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", required=True, help="section of docs/results.md and name of the JSON file")
    parser.add_argument("--model", default="cvit_base_patch1", help="a cvit_* with 224 px images")
    parser.add_argument("--keep", nargs="+", type=float, default=[1.0, 0.22, 0.05])
    parser.add_argument("--train-keep", nargs="*", type=float, default=[0.05], help="keeps of training steps, batch 1")
    parser.add_argument("--precision", default="bf16", choices=("no", "bf16"))
    parser.add_argument("--images", type=int, default=1, help="images in a batch")
    parser.add_argument("--skip-graphs", action="store_true", help="no CoMAE graph and PageRank")
    parser.add_argument("--again", action="store_true", help="measure all anew")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # what a process of its own measures
    return parser.parse_args()


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def peak() -> float:
    """Peak memory in GiB: of the GPU, or of this process."""
    if device().type == "cuda":
        return torch.cuda.max_memory_allocated() / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


def forward(
    name: str, keep: float, train: bool, side: int = SIDE, images: int = 1, precision: str = "bf16", runs: int = 1
) -> dict[str, float]:
    """A pass, or a training step with gradient checkpointing, of a model with random weights; the median of its runs.

    Args:
        name: A cvit_*.
        keep: Share of the patches.
        train: Also the backward pass.
        side: Of the images, in pixels.
        images: In a batch.
        precision: "no" or "bf16".
        runs: Timed ones; on a GPU after one to warm up.
    """
    torch.manual_seed(0)
    with device():  # weights are drawn there
        model = timm.create_model(name, img_size=side, keep=keep, remainder="none").to(device())
    batch = torch.randn(images, 3, side, side, device=device())
    model.train(train)
    model.set_grad_checkpointing(train)

    def step():
        with autocast(device(), precision), torch.set_grad_enabled(train):
            logits = model(batch).float()
            if train:
                logits.square().mean().backward()

    tokens = round(keep * model.patch_embed.num_patches)
    if device().type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step()  # warm
    before = peak() if device().type == "cpu" else 0.0
    seconds = statistics.median(clock(step)[1] for _ in range(runs))
    return {"tokens": tokens, "seconds": seconds, "peak": peak(), "before": before}


def ranker_order(args: argparse.Namespace) -> dict[str, float]:
    """The ranker's order of all patches of one image."""
    torch.manual_seed(0)
    orderer = CollapseOrder.from_pretrained("collapse_ranker_tiny_224").to(device())
    images = torch.randn(1, 3, SIDE, SIDE, device=device())
    orderer(images)  # warm
    before = peak()
    order, seconds = clock(lambda: orderer(images, grid=(SIDE, SIDE)).ranks)
    return {"patches": order.shape[1], "seconds": seconds, "peak": peak(), "before": before}


def comae_order(args: argparse.Namespace) -> dict[str, float]:
    """The exact CoMAE's graph, refined twice from 8 x 8 to 512 x 512 patches, and its PageRank."""
    torch.manual_seed(0)
    model = timm.create_model("comae_tiny", pretrained=True).to(device()).eval()
    images = torch.nn.functional.interpolate(torch.randn(1, 3, 14, 14, device=device()), SIDE, mode="bicubic")
    before = peak()
    graph, seconds = clock(lambda: hierarchical_dependency(model, images, (SIDE, SIDE), progress=True))
    ranks, rank_seconds = clock(lambda: hierarchical_pagerank(graph))
    order = Order(ranks, graph.grid)
    found = {"patches": graph.num_patches, "seconds": seconds, "pagerank_seconds": rank_seconds}
    _, found["resample_seconds"] = clock(lambda: order.resample((SIDE, SIDE)).ranks)
    return {**found, "peak": peak(), "before": before}


def sparse_pagerank(side: int, args: argparse.Namespace) -> dict[str, float]:
    """PageRank of a graph of a random image's CoMAE: hierarchical, and dense up to 32 x 32 patches."""
    torch.manual_seed(0)
    model = timm.create_model("comae_tiny", pretrained=True).to(device()).eval()
    parts = {32: (4, 4), 224: (28, 28)}[side]
    coarse = model.dependency(torch.randn(1, 3, 64, 64, device=device()))
    cells = torch.rand(1, 64, device=device()).argsort(1)[:, :14]
    # each inner graph is the CoMAE's own of another image, on its first p x q patches of 8 x 8 (repeated where more)
    inner = model.dependency(torch.randn(14, 3, 64, 64, device=device()))
    index = (torch.arange(parts[0]) % 8)[:, None] * 8 + torch.arange(parts[1]) % 8
    inner = inner[:, index.flatten()][:, :, index.flatten()].unsqueeze(0)
    graph = HierarchicalGraph(coarse, cells, inner, (8, 8), parts)
    before = peak()
    ranks, seconds = clock(lambda: hierarchical_pagerank(graph))
    found = {"patches": graph.num_patches, "seconds": seconds, "peak": peak(), "before": before}
    if side == 32:
        dense, found["dense_seconds"] = clock(lambda: pagerank(graph.dense().double()))
        orders = [Order.with_spread_ties(r, graph.grid) for r in (ranks, dense.float())]
        found["spearman"] = float(spearman(*orders))
        found["largest_difference"] = float(((ranks - dense) / dense).abs().max())
    return found


MEASURES = {
    "forward": lambda value, args: forward(args.model, float(value), False, SIDE, args.images, args.precision),
    "train": lambda value, args: forward(args.model, float(value), True, SIDE, args.images, args.precision),
    "ranker": lambda value, args: ranker_order(args),
    "comae": lambda value, args: comae_order(args),
    "pagerank": lambda value, args: sparse_pagerank(int(value), args),
}


def apart(what: str, args: argparse.Namespace) -> dict[str, float] | None:
    """A measurement in a process of its own; None where it ran out of memory."""
    command = [sys.executable, __file__, "--name", args.name, "--model", args.model, "--precision", args.precision]
    done = subprocess.run(
        [*command, "--images", str(args.images), "--one", what], stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode == OUT_OF_MEMORY or done.returncode == -signal.SIGKILL:
        return None
    if done.returncode:
        raise SystemExit(f"{what}: failed with status {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    args = parse()
    if args.one:
        kind, _, value = args.one.partition(":")
        try:
            print(json.dumps(MEASURES[kind](value, args)))
        except (MemoryError, torch.OutOfMemoryError):
            raise SystemExit(OUT_OF_MEMORY) from None
        return
    about = {"model": args.model, "precision": args.precision, "images": args.images, "device": hardware()}
    file = RESULTS.parent / f"long_sequences_{args.name}.json"
    known = json.loads(file.read_text()) if file.is_file() and not args.again else {}
    known = known.get("measured", {}) if known.get("of") == about else {}
    rows, numbers = [], {}
    names = [f"forward:{keep:g}" for keep in args.keep] + [f"train:{keep:g}" for keep in args.train_keep]
    graphs = [] if args.skip_graphs else ["pagerank:32", "pagerank:224", "comae"]
    for name in [*names, "ranker", *graphs]:
        found = numbers[name] = known[name] if name in known else apart(name, args)
        print(name, found, flush=True)
        kind, _, value = name.partition(":")
        label = {
            "forward": f"{args.model}, forward, keep {value}",
            "train": f"{args.model}, training step with gradient checkpointing, keep {value}",
            "ranker": "order of 224 x 224 patches, collapse_ranker_tiny_224, resampled",
            "comae": "CoMAE graph and PageRank, refined from 8 x 8 to 512 x 512 patches",
            "pagerank": f"hierarchical PageRank, {value} x {value} patches",
        }[kind]
        size = found and (found.get("tokens") or found.get("patches"))
        rows.append(
            {
                "": label,
                "tokens or patches": f"{size:,}" if found else "",
                "seconds": f"{found['seconds'] + found.get('pagerank_seconds', 0):.2f}" if found else "out of memory",
                "peak memory, GiB": f"{found['peak']:.2f}" if found else "",
                "of it model and libraries": f"{found['before']:.2f}" if found and found["before"] else "",
            }
        )
    text = [
        f"One batch of {args.images} at 224 px, random weights, {args.precision if args.precision != 'no' else 'fp32'} "
        "autocast, orders included.",
        markdown_table(rows),
    ]
    if small := numbers.get("pagerank:32"):
        text.append(
            f"At 1,024 patches the hierarchical PageRank and the dense solution of the same graph agree: Spearman "
            f"{small['spearman']:.5f}, largest relative difference of a rank {small['largest_difference']:.1e}; "
            f"{small['seconds']:.3f} s against {small['dense_seconds']:.2f} s."
        )
    write_section(
        f"long_sequences_{args.name}",
        f"Long sequences ({args.name})",
        "\n\n".join(text),
        {"of": about, "measured": numbers},
    )
    print("\n\n".join(text))


if __name__ == "__main__":
    main()
