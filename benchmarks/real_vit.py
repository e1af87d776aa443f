"""Orders, remainders and area biases on a frozen ViT, against the same ViT on the image downscaled to as many tokens.

    python benchmarks/real_vit.py --name caltech101 --model local-dir:runs/real_vit --blocks 11 \
        --dataset data/caltech101 --probe 1000 --images 300 \
        --orders random bayer halton centre variance collapse_ranker_tiny_224 class-attention k-centre dpp

Nothing is trained but a linear probe on whole images (--probe 0: the model's own classifier). Every finished cell of
the table stays in docs/real_vit_NAME.json, so that a run that is cut off goes on, and a later one adds rows.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm
from vit_cells import Cell, curves, report
from vit_orders import OWN_ORDERS
from vit_probe import add_source, first_blocks, linear_probe

import timm_collapse  # noqa: F401  (registers the models)
from timm_collapse import CollapseError, CollapseOrder, Order
from timm_collapse.data import eval_transform, open_dataset
from timm_collapse.evaluation import image_batches
from timm_collapse.evaluation.accuracy import with_orderer
from timm_collapse.evaluation.cost import autocast, images_per_second
from timm_collapse.evaluation.report import write_section
from timm_collapse.lessons.features import output_distance
from timm_collapse.order import BASELINES
from timm_collapse.plots import plot_budgets, save

CONTROLS = ("reversed", "another")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_source(parser, images=300)
    parser.add_argument("--probe", type=int, default=1000, help="photos of the train split for it; 0: own classifier")
    parser.add_argument("--budgets", nargs="+", type=int, default=[128, 64, 32])
    parser.add_argument(
        "--orders", nargs="+", default=["random", "bayer", "halton", "centre", "variance", "collapse_ranker_tiny_224"],
        help=f"baselines, {', '.join(OWN_ORDERS)}, orderers; NAME:reversed and NAME:another (image's) are controls",
    )  # fmt: skip
    parser.add_argument("--seeds", type=int, default=3, help="of the random order")
    parser.add_argument(
        "--remainders", nargs="*", default=[], help="fused, or coarse, mixed, split, zoom, each :SHARE; none is always"
    )
    parser.add_argument("--remainder-orders", nargs="*", default=["collapse_ranker_tiny_224"])
    parser.add_argument("--area-biases", nargs="+", type=float, default=[0.0, 0.5])
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--precision", default="bf16", choices=("no", "bf16"))
    parser.add_argument("--runs", type=int, default=3, help="timed runs; 0: the speeds of the last run stay")
    parser.add_argument("--timed-batch", type=int, default=8)
    parser.add_argument("--plot-bias", type=float, default=0.5, help="area bias of the curves in the plot")
    parser.add_argument("--cache", default="runs/real_vit_cache", help="folder of features of whole images and orders")
    parser.add_argument("--note", default="", help="text under the tables")
    return parser.parse_args()


def cells_of(args: argparse.Namespace) -> Iterator[Cell]:
    """All cells that were asked for, the largest budget first."""
    for budget in sorted(args.budgets, reverse=True):
        for order in args.orders:
            for name in [f"random {seed}" for seed in range(args.seeds)] if order == "random" else [order]:
                yield Cell(name, "none", 0, 0, budget)
        for remainder, _, share in (spec.partition(":") for spec in args.remainders):
            for order in args.remainder_orders:
                for bias in args.area_biases:
                    yield Cell(order, remainder, float(share or 0), bias, budget)


def sides_of(budget: int) -> list[int]:
    """Sides of the square grids with about as many patches as a budget."""
    return sorted({math.isqrt(budget), math.isqrt(budget - 1) + 1})


class Bench:
    """The ViT, the images and what is known of them; `store` is the JSON file that the cells are in."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.vit = self.build(args.img_size)
        cfg, dataset = self.vit.pretrained_cfg, open_dataset(args.dataset, args.split, labelled=True).dataset
        transform = eval_transform(args.img_size, cfg["mean"], cfg["std"])
        self.images, self.labels = map(torch.cat, zip(*image_batches(dataset, transform, args.images)))
        self.grid, self.patch = tuple(self.vit.patch_embed.grid_size), self.vit.patch_embed.patch_size[0]
        self.question = {"model": args.model.split("/")[-1], "blocks": args.blocks, "img_size": args.img_size,
                         "dataset": Path(args.dataset).name, "split": args.split, "images": len(self.images),
                         "probe": args.probe, "precision": args.precision}  # fmt: skip
        self.twins: dict[str, timm_collapse.Collapsed] = {}
        self.orders: dict[tuple[str, int], Order] = {}
        whole = self.cached("whole", lambda: self.run(self.vit, self.images))
        self.classify = self.fit(transform) if args.probe else lambda features: features
        self.whole = self.classify(whole)
        self.store = Path("docs") / f"real_vit_{args.name}.json"
        found = json.loads(self.store.read_text()) if self.store.exists() else {}
        self.found = found["found"] if found.get("question") == self.question else {}

    def build(self, img_size: int):
        """The ViT for images of one size."""
        vit = first_blocks(self.args.model, img_size, self.args.blocks)
        if self.args.probe:
            vit.reset_classifier(0)
        elif not vit.num_classes:
            raise CollapseError("probe must be at least 1 for a model without a classifier, got 0")
        return vit.requires_grad_(False)

    def cached(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """What `make` gives, from the cache if it was made for the same question."""
        file = Path(self.args.cache) / f"{'_'.join(map(str, self.question.values()))}_{name.replace('/', '_')}.pt"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.save(make(), file)
        return torch.load(file)

    def run(self, vit, images: Tensor, order: Order | None = None, name: str = "whole") -> Tensor:
        """Outputs of a model, batch by batch."""
        found = []
        for start in tqdm(range(0, len(images), self.args.batch_size), desc=name, leave=False):
            part = slice(start, start + self.args.batch_size)
            with torch.no_grad(), autocast(images.device, self.args.precision):
                found.append(vit(images[part], **({} if order is None else {"order": order[part]})).float())
        return torch.cat(found)

    def fit(self, transform: Callable) -> Callable[[Tensor], Tensor]:
        """A linear probe on whole images of the training split: features -> logits."""
        dataset = open_dataset(self.args.dataset, "train", labelled=True).dataset
        batches = image_batches(dataset, transform, self.args.probe, self.args.batch_size)
        labels = torch.as_tensor(dataset.labels)[
            torch.arange(len(batches.dataset)) * len(dataset) // len(batches.dataset)
        ]
        features = self.cached("train", lambda: torch.cat([self.run(self.vit, images) for images, _ in tqdm(batches)]))
        probe = linear_probe(features, labels, int(max(labels.max(), self.labels.max())) + 1)
        return probe.requires_grad_(False)

    def twin(self, name: str):
        """The ViT collapsed with an orderer."""
        base = name.split(":")[0].split(" ")[0]
        known = base if base not in OWN_ORDERS else "bayer"
        if known not in self.twins:
            self.twins[known] = with_orderer(
                self.vit, CollapseOrder.named(known, seed=0) if known in BASELINES else known
            )
        return self.twins[known]

    def order(self, name: str, places: int) -> Order:
        """The order of all images, of which so many first places are asked for."""
        if name.split(":")[0] in (*OWN_ORDERS, *BASELINES) or name.startswith("random "):
            places = self.grid[0] * self.grid[1]  # these are the same for all
        if (key := (name, places)) not in self.orders:
            scores = self.cached(f"order_{name}_{places}", lambda: self.make_order(name, places).scores)
            self.orders[key] = Order(scores, self.grid)
        return self.orders[key]

    def make_order(self, name: str, places: int) -> Order:
        """As `order`, made now."""
        base, _, control = name.partition(":")
        if control:
            if control not in CONTROLS:
                raise CollapseError(f"orders: a control must be one of {', '.join(CONTROLS)}, got {control!r}")
            order = self.order(base, self.grid[0] * self.grid[1] if control == "reversed" else places)
            return order.reversed() if control == "reversed" else order[torch.arange(len(order)).roll(1)]
        if base.startswith("random "):
            return CollapseOrder.baseline("random", seed=int(base.split()[1]))(self.images, self.grid)
        parts = tqdm(self.images.split(self.args.batch_size), desc=base, leave=False)
        with torch.no_grad(), autocast(self.images.device, self.args.precision):
            if base in OWN_ORDERS:
                return Order.cat([OWN_ORDERS[base](self.vit, part, places) for part in parts])
            return Order.cat([self.twin(base).compute_order(part, upto=places) for part in parts])

    def set_up(self, cell: Cell):
        """The collapsed model of a cell."""
        twin = self.twin(cell.order)
        twin.keep, twin.remainder, twin.area_bias = cell.budget, cell.remainder, cell.bias
        twin.coarse_share = cell.share or 0.5
        return twin

    def downscaled(self, side: int) -> Callable[[Tensor], Tensor]:
        """The ViT for a grid of side x side patches, on images that it shrinks first."""
        vit, size = self.build(side * self.patch), (side * self.patch,) * 2
        return lambda images: vit(torch.nn.functional.interpolate(images, size, mode="bicubic", antialias=True))

    def score(self, logits: Tensor, tokens: int) -> dict[str, float]:
        """Top-1 in per cent with its standard error, and root KL from the output on the whole images."""
        hits = (logits.argmax(1) == self.labels).float()
        distance = output_distance(logits, self.whole, logits.shape[1]).mean()
        error = (hits.mean() * (1 - hits.mean()) / len(hits)).sqrt()
        return {
            "tokens": tokens,
            "top1": 100 * float(hits.mean()),
            "error": 100 * float(error),
            "root_kl": float(distance),
        }

    def keep(self, key: str, measured: dict[str, float]) -> None:
        """Remember a finished cell, on disk too."""
        self.found[key] = measured
        self.store.write_text(json.dumps({"question": self.question, "found": self.found}, indent=1) + "\n")

    def measure(self) -> None:
        """Whatever is not known yet."""
        self.found.setdefault("whole", self.score(self.whole, self.grid[0] * self.grid[1]))
        for side in {side for budget in self.args.budgets for side in sides_of(budget)}:
            if (key := f"downscaled|{side * side}") not in self.found:
                features = self.run(self.downscaled(side), self.images, name=key)
                self.keep(key, self.score(self.classify(features), side * side))
        for cell in tqdm([cell for cell in cells_of(self.args) if cell.key not in self.found], desc="cells"):
            model = self.set_up(cell)
            order = self.order(cell.order, max(1, model.plan(cell.budget, self.grid).places))
            features = self.run(model, self.images, order, cell.key)
            self.keep(cell.key, self.score(self.classify(features), cell.budget))

    def time(self) -> None:
        """Images a second of all cells, orders included, in turn; cells that do the same work share a time."""
        images = self.images[: self.args.timed_batch]
        calls: dict[str, Callable[[], object]] = {"whole": lambda: self.vit(images)}
        for tokens in {int(key.split("|")[1]) for key in self.found if key.startswith("downscaled")}:
            calls[f"downscaled|{tokens}"] = partial(self.downscaled(math.isqrt(tokens)), images)
        for cell in Cell.all_of(self.found):
            calls.setdefault(cell.work, partial(self.ordered, cell, images))
        with autocast(images.device, self.args.precision):
            speeds = images_per_second(calls, len(images), self.args.runs)
        for key, measured in self.found.items():
            measured["images_per_second"] = speeds[Cell.of(key).work if Cell.is_key(key) else key]

    def ordered(self, cell: Cell, images: Tensor) -> Tensor:
        twin, base = self.set_up(cell), cell.order.split(":")[0]
        if base not in OWN_ORDERS:
            return twin(images)
        return twin(images, order=OWN_ORDERS[base](self.vit, images, cell.budget))


def main() -> None:
    args = parse()
    bench = Bench(args)
    bench.measure()
    if args.runs:
        bench.time()
    found, question = bench.found, bench.question
    text = report(found, question, args)
    write_section(
        f"real_vit_{args.name}", f"A real ViT: {args.name}", "\n\n".join(text), {"question": question, "found": found}
    )
    if all("images_per_second" in measured for measured in found.values()):
        figure = plot_budgets(curves(found, args.plot_bias, args.remainder_orders, args.remainders))
        save(figure, Path("docs") / f"real_vit_{args.name}.png")
    print("\n\n".join(text))


if __name__ == "__main__":
    main()
