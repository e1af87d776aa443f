"""Accuracy over tokens and over measured speed of CViTs with patches of different sizes, as one table and one plot.

    python benchmarks/patch_scaling.py --name tin100 --dataset data/tiny-imagenet-100 \
        --run 'patch 16=runs/p16' --run 'patch 4, collapse=runs/p4' --run 'patch 4, random=runs/p4_random'

Each model is measured with its own orderer and remainder at the token budgets that its recipe names (train/cvit.py
--keep_schedule 16,32,64); the counts stay in its folder as scaling.json. All are timed in turn, orders included.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import timm
import torch
from cvit_accuracy import measured_once
from timm.data import resolve_model_data_config

import timm_collapse  # noqa: F401  (registers the models)
from timm_collapse.evaluation import AccuracyCurve, count_macs
from timm_collapse.evaluation.cost import autocast, images_per_second
from timm_collapse.evaluation.report import markdown_table, write_section
from timm_collapse.hub.save import weights_hash
from timm_collapse.order import parse_keep, resolve_keep
from timm_collapse.plots import plot_budgets, save


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", required=True, help="section of docs/results.md and name of the JSON file")
    parser.add_argument("--run", action="append", required=True, metavar="NAME=FOLDER,...", help="a variant, its seeds")
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--split", default="validation")
    parser.add_argument("--images", type=int, default=0, help="evenly spaced images of the split; 0: all")
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--precision", default="bf16", choices=("no", "bf16"))
    parser.add_argument("--timed", type=int, default=3, help="timed batches of each model at each budget")
    parser.add_argument("--measure-only", action="store_true", help="write scaling.json, no table")
    parser.add_argument("--note", default="", help="text under the table: how the variants were trained")
    return parser.parse_args()


def load(folder: str):
    """A trained model, and the token budgets that it was trained at, ascending."""
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    recipe = json.loads((Path(folder) / "recipe.json").read_text())
    patches = model.patch_embed.num_patches
    schedule = map(parse_keep, recipe["arguments"]["keep_schedule"].split(","))
    return model, sorted({resolve_keep(budget, patches) for budget in schedule})


def measured(folder: str, model, budgets: list[int], args: argparse.Namespace) -> AccuracyCurve:
    """Accuracy of one run at its budgets, from its folder if the same was measured before."""
    question = {"budgets": budgets, "precision": args.precision, "weights": weights_hash(model)}
    keeps = [budget / model.patch_embed.num_patches for budget in budgets]
    return measured_once(folder, "scaling.json", question, keeps, args)


@torch.no_grad()
def costs(models: dict[str, tuple], args: argparse.Namespace) -> dict[str, dict[int, dict[str, float]]]:
    """Name -> budget -> multiply-accumulates an image and images a second, all timed in turn."""
    calls = {}
    for name, (model, budgets) in models.items():
        images = torch.randn(args.batch_size, *resolve_model_data_config(model)["input_size"])
        for budget in budgets:
            keep = budget if budget < model.patch_embed.num_patches else 1.0

            def call(model=model, keep=keep, images=images):
                model.keep = keep
                return model(images)

            calls[name, budget] = call
    with autocast(torch.device("cpu"), args.precision):
        speeds = images_per_second(calls, args.batch_size, args.timed)
        found = {key: {"macs": count_macs(call) / args.batch_size, "speed": speeds[key]} for key, call in calls.items()}
    return {name: {budget: found[name, budget] for n, budget in found if n == name} for name in models}


def main() -> None:
    args = parse()
    runs = {name: folders.split(",") for name, folders in (run.split("=", 1) for run in args.run)}
    loaded = {name: [load(folder) for folder in folders] for name, folders in runs.items()}
    curves = {name: [measured(folder, *pair, args) for folder, pair in zip(runs[name], loaded[name])] for name in runs}
    if args.measure_only:
        return
    models = {name: pairs[0] for name, pairs in loaded.items()}
    found = costs(models, args)
    points, numbers = {}, {}
    for name, seeds in curves.items():
        budgets = sorted(found[name])
        points[name] = []
        for budget, keep in zip(budgets, sorted(seeds[0].keeps), strict=True):
            values = [curve.top1[curve.at(keep)] for curve in seeds]
            error = seeds[0].top1_error[seeds[0].at(keep)]  # seeds see the same images
            points[name].append((budget, sum(values) / len(values), error, found[name][budget]["speed"]))
        numbers[name] = {
            budget: {"top1": [curve.top1[curve.at(keep)] for curve in seeds], **found[name][budget]}
            for budget, keep in zip(budgets, sorted(seeds[0].keeps), strict=True)
        }
    every = sorted({budget for values in numbers.values() for budget in values})
    cell = lambda values, budget, text: text(values[budget]) if budget in values else ""  # noqa: E731
    accuracy = [
        {"variant": name}
        | {f"{b} tokens": cell(v, b, lambda c: f"{sum(c['top1']) / len(c['top1']):.1f}") for b in every}
        for name, v in numbers.items()
    ]
    speed = [
        {"images/s (GMACs)": name}
        | {f"{b} tokens": cell(v, b, lambda c: f"{c['speed']:.0f} ({c['macs'] / 1e9:.2f})") for b in every}
        for name, v in numbers.items()
    ]
    first = next(iter(curves.values()))[0]
    embeds = [model.patch_embed for model, _ in models.values()]
    size = embeds[0].img_size[0]
    sizes = sorted({(embed.patch_size[0], embed.num_patches) for embed in embeds}, reverse=True)
    patches = ", ".join(f"{count:,} of {side} px" for side, count in sizes)
    text = [
        f"Top-1 in per cent at each token budget, {first.images} validation images of {Path(args.dataset).name} "
        f"(standard error {first.top1_error[0]:.1f}; the variants see the same images), and images a second, orders "
        f"included, in {'bf16' if args.precision == 'bf16' else 'fp32'}. An image of {size} px has {patches} patches.",
        markdown_table(accuracy),
        markdown_table(speed),
    ]
    if args.note:
        text.append(args.note)
    write_section(f"scaling_{args.name}", f"Patch scaling: {args.name}", "\n\n".join(text), {"variants": numbers})
    save(plot_budgets(points), Path("docs") / f"scaling_{args.name}.png")
    print("\n\n".join(text))


if __name__ == "__main__":
    main()
