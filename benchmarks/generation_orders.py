"""Generation orders compared on the same trained generators: distances of their samples from real images.

    python benchmarks/generation_orders.py --name cifar10 --models mar=runs/mar cmar=runs/cmar \\
        --bank runs/cmar/order_bank.safetensors --dataset data/cifar10 --features local-dir:runs/judge

For every model and order the guidance scale is chosen on --sweep-samples samples of a seed of their own; then --samples
are made with it for each of --seeds. Labels and start noise of a seed are the same for all orders. Every measured cell
is a file in --work: a killed run goes on, and several processes (--part 0/2, 1/2) share the cells. Every run ends with
the table of the rows that are there.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import NamedTuple

import timm
import torch
from tqdm.auto import tqdm

import timm_collapse  # noqa: F401  (registers the models)
from timm_collapse import ClassOrderBank, CollapseOrder, GenerationOrder
from timm_collapse.data import open_dataset
from timm_collapse.data.latents import ResizedPixels
from timm_collapse.evaluation.generation import Features, evaluate_generation, extract_features
from timm_collapse.evaluation.report import markdown_table, write_section
from timm_collapse.models.draft import draft_order
from timm_collapse.models.transformer import use_plain_attention

ORDERS = ("random", "halton", "bayer", "raster", "centre", "collapse", "shuffled classes", "reversed", "draft",
          "confidence")  # fmt: skip
MEAN_ORDERS = ("collapse mean", "mean of shuffled classes", "mean reversed")
"""Plackett-Luce noise around the mean order of the class; another temperature than MEAN_TEMPERATURE: "... T=0.3"."""
MEAN_TEMPERATURE = 0.1
SWEEP_SEED = 1000
SHOWN = ("frechet", "kid", "precision", "recall", "density", "coverage", "label_accuracy", "classifier_score")


class Cell(NamedTuple):
    """One batch of samples to measure."""

    model: str
    order: str
    guidance: float
    seed: int
    samples: int

    @property
    def file(self) -> str:
        return f"{self.model}-{self.order}-{self.guidance:g}-{self.seed}-{self.samples}.json".replace(" ", "_")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--name", required=True, help="section of docs/results.md and name of the JSON file")
    add("--models", nargs="+", required=True, metavar="LABEL=FOLDER", help="trained generators")
    add("--bank", required=True, help="order bank of the training images")
    add(
        "--orders",
        nargs="+",
        default=[*ORDERS, *MEAN_ORDERS],
        type=_order_name,
        metavar="ORDER",
        help=f"{', '.join(ORDERS)}; around the mean of a class (temperature {MEAN_TEMPERATURE}, or such as "
        f"'collapse mean T=0.3'): {', '.join(MEAN_ORDERS)}",
    )
    add("--dataset", required=True)
    add("--references", type=int, default=10000, help="evenly spaced training images to compare with")
    add("--features", required=True, help="timm classifier of the data set")
    add("--samples", type=int, default=5000)
    add("--seeds", type=int, nargs="+", default=[0, 1])
    add("--sweep-samples", type=int, default=1000)
    add("--guidance", type=float, nargs="+", default=[1.0, 1.5, 2.0, 3.0])
    add("--guidance-schedule", default="constant", choices=["linear", "constant"])
    add("--steps", type=int, default=16)
    add("--diffusion-steps", type=int, default=25)
    add("--temperature", type=float, default=1.0)
    add("--orderer", default="collapse_ranker_tiny", help="orders the drafts")
    add("--batch-size", type=int, default=250)
    add("--note", default="", help="what else the table should say, such as what the models are")
    add("--work", default="runs/generation_orders")
    add("--part", default="0/1", help="i/n: this process measures every n-th order")
    add("--report", action="store_true", help="measure nothing, write the table of what is there")
    return parser.parse_args()


def _order_name(name: str) -> str:
    kind, _, temperature = name.partition(" T=")
    if kind not in MEAN_ORDERS and name not in ORDERS:
        raise argparse.ArgumentTypeError(f"must be one of {', '.join([*ORDERS, *MEAN_ORDERS])}, got {name!r}")
    float(temperature or MEAN_TEMPERATURE)
    return name


def main() -> None:
    args = parse()
    work = Path(args.work)
    work.mkdir(parents=True, exist_ok=True)
    bench = Bench(args)
    own, parts = (int(n) for n in args.part.split("/"))
    models = dict(item.split("=", 1) for item in args.models)
    pairs = [(model, order) for order in args.orders for model in models]
    for model, order in [] if args.report else pairs[own::parts]:
        best = bench.best_guidance(model, order)
        for seed in args.seeds:
            bench.measure(Cell(model, order, best, seed, args.samples))
    report(args, bench, pairs)


class Bench:
    """Generates and measures cells; what is slow to make is made once."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.work = args, Path(args.work)
        self.bank = ClassOrderBank.load(args.bank)
        self.folders = dict(item.split("=", 1) for item in args.models)
        self.models: dict[str, torch.nn.Module] = {}
        self.judge = timm.create_model(args.features, pretrained=True).eval()
        self.orderer = CollapseOrder.named(args.orderer)
        use_plain_attention(self.orderer)
        self._real: Features | None = None

    def sweep(self, model: str, order: str) -> list[Cell]:
        """Samples that choose the guidance scale, and are not measured again."""
        return [Cell(model, order, g, SWEEP_SEED, self.args.sweep_samples) for g in self.args.guidance]

    def best_guidance(self, model: str, order: str) -> float:
        """The scale with the smallest Fréchet distance."""
        return min(self.sweep(model, order), key=lambda cell: self.measure(cell)["frechet"]).guidance

    def measured(self, model: str, order: str) -> tuple[dict[float, float], list[dict]]:
        """What is there of a row: Fréchet distance by guidance scale in the sweep, and the seeds at the best scale."""
        found = {c.guidance: self.measure(c)["frechet"] for c in self.sweep(model, order) if self.has(c)}
        best = min(found, key=found.get, default=None)
        cells = [Cell(model, order, best, seed, self.args.samples) for seed in self.args.seeds] if found else []
        return found, [self.measure(cell) for cell in cells if self.has(cell)]

    def has(self, cell: Cell) -> bool:
        """Whether a cell is measured."""
        return (self.work / cell.file).exists()

    def measure(self, cell: Cell) -> dict:
        path = self.work / cell.file
        if not path.exists():
            result = self._measure(cell)
            temporary = path.with_suffix(".tmp")
            temporary.write_text(json.dumps(result))
            temporary.replace(path)
        return json.loads(path.read_text())

    def _measure(self, cell: Cell) -> dict:
        labels = torch.arange(cell.samples) % self.model(cell.model).num_classes
        images = torch.cat([self.generate(cell, i, part) for i, part in enumerate(
            tqdm(labels.split(self.args.batch_size), desc=Path(cell.file).stem, mininterval=10))])  # fmt: skip
        fake = extract_features(self.judge, images, precision="bf16", batch_size=250, progress=False)
        fake.labels = labels
        return evaluate_generation(fake, self.real).to_dict()

    @torch.no_grad()
    def generate(self, cell: Cell, number: int, labels: torch.Tensor) -> torch.Tensor:
        """uint8 images (B, 3, H, W)."""
        mar, args = self.model(cell.model), self.args
        # the noise is drawn apart from the orders, which draw different amounts of randomness
        own = torch.Generator().manual_seed(cell.seed * 1_000_003 + number)
        noise = torch.randn(len(labels), mar.seq_len, mar.token_dim, generator=own)
        codec = mar.codec()
        with torch.autocast("cpu", torch.bfloat16):
            order = self.order(cell.order, mar.grid)
            if order is None:
                order = draft_order(mar, codec, self.orderer, labels, args.steps // 2, generator=own)
            latents = mar.generate(
                labels, args.steps, cell.guidance, args.guidance_schedule, args.temperature, order, noise, own,
                args.diffusion_steps,
            )  # fmt: skip
        return (codec.decode(latents) * 255).round().to(torch.uint8)

    def order(self, name: str, grid: tuple[int, int]) -> GenerationOrder | None:
        """None for the order of a draft, which is made first."""
        if name == "draft":
            return None
        kind, _, temperature = name.partition(" T=")
        if kind in MEAN_ORDERS:
            bank = self.bank.shuffled(0) if "shuffled" in kind else self.bank
            direction = "collapse_reversed" if "reversed" in kind else "collapse"
            return GenerationOrder(direction, grid, bank, "mean", float(temperature or MEAN_TEMPERATURE))
        if name == "shuffled classes":
            return GenerationOrder("collapse", grid, self.bank.shuffled(0))
        return GenerationOrder("collapse_reversed" if name == "reversed" else name, grid, self.bank)

    def model(self, label: str):
        if label not in self.models:
            self.models[label] = timm.create_model(f"local-dir:{self.folders[label]}", pretrained=True).eval()
            use_plain_attention(self.models[label])
        return self.models[label]

    @property
    def real(self) -> Features:
        """Features of the training images, kept in a file."""
        path = self.work / "real.pt"
        if self._real is None and path.exists():
            self._real = Features(**torch.load(path))
        if self._real is None:
            dataset = open_dataset(self.args.dataset, "train").dataset
            pixels = ResizedPixels(dataset, next(iter(map(self.model, self.folders))).img_size)
            picked = torch.linspace(0, len(dataset) - 1, min(self.args.references, len(dataset))).long().tolist()
            images = torch.stack([pixels[i][0] for i in tqdm(picked, desc="real images")])
            self._real = extract_features(self.judge, images, precision="bf16", batch_size=250)
            torch.save(vars(self._real), path)
        return self._real


def report(args: argparse.Namespace, bench: Bench, pairs: list[tuple[str, str]]) -> None:
    """Writes the table of all rows whose cells are there."""
    rows, data = [], {"sweeps": {}, "cells": {}}
    for model, order in pairs:
        sweep, found = bench.measured(model, order)
        if not found:
            print(f"not measured yet: {model}, {order}")
            continue
        best = min(sweep, key=sweep.get)
        data["sweeps"][f"{model}, {order}"] = sweep
        data["cells"][f"{model}, {order}"] = {"guidance": best, "seeds": found}
        means = {key: statistics.mean(each[key] for each in found) for key in SHOWN}
        spread = max(each["frechet"] for each in found) - min(each["frechet"] for each in found)
        rows.append({
            "model": model, "order": order, "guidance": f"{best:g}" if len(sweep) > 1 else f"{best:g} (fixed)",
            "seeds": len(found),
            "Fréchet": f"{means['frechet']:.3f} (± {spread / 2:.3f})", "kernel x 1000": f"{1000 * means['kid']:.2f}",
            **{key: f"{means[key]:.3f}" for key in ("precision", "recall", "density", "coverage")},
            "label accuracy": f"{100 * means['label_accuracy']:.1f}%", "score": f"{means['classifier_score']:.2f}",
        })  # fmt: skip
    if not rows:
        return
    rows.sort(key=lambda row: (row["model"], float(row["Fréchet"].split()[0])))
    top1 = json.loads((Path(args.features.removeprefix("local-dir:")) / "recipe.json").read_text())["validation_top1"]
    note = f" {args.note}" if args.note else ""
    judge = bench.judge.pretrained_cfg["architecture"]
    scales = ", ".join(f"{g:g}" for g in args.guidance)
    text = (
        f"{args.samples} samples a seed (± half the range of the seeds), {args.steps} steps, {args.diffusion_steps} "
        f"diffusion steps, {args.guidance_schedule} guidance, its scale chosen for each row among {scales} (unless "
        f"fixed) on {args.sweep_samples} samples of another seed. Distances to {args.references} training images in "
        f"the features of a {judge} trained on them ({top1:.1f}% top-1): not FID.{note}\n\n{markdown_table(rows)}"
    )
    write_section(f"generation_orders_{args.name}", f"Generation orders: {args.name}", text, data)
    print(text)


if __name__ == "__main__":
    main()
