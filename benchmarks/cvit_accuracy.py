"""Accuracy over keep of CViTs that were trained with different orders, with seeds, as one table.

    python benchmarks/cvit_accuracy.py --name tin100 --dataset data/tiny-imagenet-100 --reference random \
        --run random=runs/random0,runs/random1 --run bayer=runs/bayer0,runs/bayer1

Each run is measured once, with its own orderer and remainder; the counts stay in its folder as accuracy.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import timm
import torch
from timm.data import resolve_model_data_config

import timm_collapse  # noqa: F401  (registers the models)
from timm_collapse.data import eval_transform, open_dataset
from timm_collapse.evaluation import AccuracyCurve, accuracy_curves, image_batches
from timm_collapse.evaluation.report import markdown_table, write_section
from timm_collapse.plots import plot_accuracy, save

KEEPS = (1.0, 0.7, 0.5, 0.35, 0.25, 0.22, 0.1, 0.05, 0.01)
SHOWN = (1.0, 0.7, 0.5, 0.22, 0.1)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", required=True, help="section of docs/results.md and name of the JSON file")
    parser.add_argument("--run", action="append", required=True, metavar="NAME=FOLDER,...", help="a variant, its seeds")
    parser.add_argument("--reference", default="random", help="variant to which differences are given")
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--split", default="validation")
    parser.add_argument("--images", type=int, default=0, help="evenly spaced images of the split; 0: all")
    parser.add_argument("--batch-size", type=int, default=250)
    parser.add_argument("--precision", default="bf16", choices=("no", "bf16"))
    parser.add_argument("--measure-only", action="store_true", help="write accuracy.json, no table")
    parser.add_argument("--note", default="", help="text under the table: how the variants were trained")
    return parser.parse_args()


def measured(folder: str, args: argparse.Namespace) -> AccuracyCurve:
    """The curve of one run, from its folder if it was measured on the same images."""
    return measured_once(folder, "accuracy.json", {"keeps": list(KEEPS)}, KEEPS, args)


def measured_once(
    folder: str, name: str, more: dict, keeps: Sequence[float], args: argparse.Namespace
) -> AccuracyCurve:
    """The curve of one run.

    Args:
        folder: Of the run.
        name: Of the file in it that keeps the counts; they are taken from there if the question was the same.
        more: What the question is, beside the images.
        keeps: Ratios.
        args: dataset, split, images, batch_size and precision.
    """
    file = Path(folder) / name
    question = {"dataset": Path(args.dataset).name, "split": args.split, "images": args.images, **more}
    if file.exists() and (found := json.loads(file.read_text()))["question"] == question:
        return AccuracyCurve(**found["curve"])
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    cfg = resolve_model_data_config(model)
    transform = eval_transform(cfg["input_size"][-1], cfg["mean"], cfg["std"])
    batches = image_batches(open_dataset(args.dataset, args.split).dataset, transform, args.images, args.batch_size)
    torch.manual_seed(0)
    curve = accuracy_curves({"run": model}, batches, keeps, args.precision)["run"]
    fields = {"keeps": curve.keeps, "hits1": curve.hits1, "hits5": curve.hits5, "images": curve.images}
    file.write_text(json.dumps({"question": question, "curve": fields}) + "\n")
    return curve


def main() -> None:
    args = parse()
    runs = {name: folders.split(",") for name, folders in (run.split("=", 1) for run in args.run)}
    curves = {name: [measured(folder, args) for folder in folders] for name, folders in runs.items()}
    if args.measure_only:
        return
    reference = curves[args.reference]
    rows, numbers = [], {}
    for name, seeds in sorted(curves.items(), key=lambda item: -mean([c.top1[c.at(0.22)] for c in item[1]])):
        row = {"variant": name, "seeds": len(seeds)}
        for keep in SHOWN:
            values = [curve.top1[curve.at(keep)] for curve in seeds]
            spread = f" ± {(max(values) - min(values)) / 2:.1f}" if len(values) > 1 else ""
            row[f"{keep:.0%}"] = f"{mean(values):.1f}{spread}"
        gaps = [ours.top1[ours.at(0.22)] - theirs.top1[theirs.at(0.22)] for ours, theirs in zip(seeds, reference)]
        row[f"22% against {args.reference}"] = f"{mean(gaps):+.1f}"
        row["AuC"] = f"{mean([curve.auc for curve in seeds]):.1f}"
        row["knee"] = ", ".join("none" if curve.knee is None else f"{curve.knee:.0%}" for curve in seeds)
        rows.append(row)
        numbers[name] = {"gap_at_22": gaps, "curves": [curve.to_dict() for curve in seeds]}
    images = reference[0].images
    error = mean([curve.top1_error[curve.at(0.22)] for curve in reference])
    text = [
        f"Top-1 in per cent at each keep ratio, {images} validation images of {Path(args.dataset).name} (standard "
        f"error of one figure at 22%: {error:.1f}; the variants see the same images). ± is half the range of the "
        "seeds. AuC: mean top-1 over 0 to 99% masked; knee: Kneedle, as a keep ratio. Coarse and fused tokens count as "
        "tokens.",
        markdown_table(rows),
    ]
    if args.note:
        text.append(args.note)
    write_section(f"cvit_{args.name}", f"CViT: {args.name}", "\n\n".join(text), {"variants": numbers})
    save(plot_accuracy({name: pooled(seeds) for name, seeds in curves.items()}), Path("docs") / f"cvit_{args.name}.png")
    print("\n\n".join(text))


def pooled(seeds: list[AccuracyCurve]) -> AccuracyCurve:
    """The curve of all seeds together: their counts added up."""
    hits1, hits5 = ([sum(values) for values in zip(*hits)] for hits in zip(*((c.hits1, c.hits5) for c in seeds)))
    return AccuracyCurve(seeds[0].keeps, hits1, hits5, sum(curve.images for curve in seeds))


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


if __name__ == "__main__":
    main()
