"""What spreading a coarse order over finer patches is worth: top-1 of a resampled ViT, without training.

    python benchmarks/order_spread.py --name tin100 --model runs/base --dataset data/tiny-imagenet-100

The ViT was trained on random subsets of larger patches; each spread (see Order.resample) feeds the same frozen weights.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import timm
import torch
from timm.data import resolve_model_data_config

import timm_collapse  # noqa: F401  (registers the models)
from timm_collapse.data import eval_transform, open_dataset
from timm_collapse.evaluation import image_batches
from timm_collapse.evaluation.cost import autocast
from timm_collapse.evaluation.report import markdown_table, write_section
from timm_collapse.hub.save import pretrained_source


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", required=True, help="section of docs/results.md and name of the JSON file")
    parser.add_argument("--model", required=True, help="folder of a trained cvit_*")
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--split", default="validation")
    parser.add_argument("--images", type=int, default=1000, help="evenly spaced images of the split; 0: all")
    parser.add_argument("--patch-sizes", nargs="+", type=int, default=[4, 2])
    parser.add_argument("--budgets", nargs="+", type=int, default=[16, 32, 64, 128])
    parser.add_argument("--spreads", nargs="+", type=float, default=[0.0, 0.15, 0.3, 0.45, 0.7, 1.0])
    parser.add_argument("--batch-size", type=int, default=50)
    return parser.parse_args()


@torch.no_grad()
def main() -> None:
    args = parse()
    config = json.loads((Path(args.model) / "config.json").read_text())
    weights = pretrained_source(args.model)
    models = {
        patch: timm.create_model(
            config["architecture"],
            pretrained=True,
            pretrained_cfg_overlay=weights,
            patch_size=patch,
            num_classes=config["num_classes"],
        ).eval()  # fmt: skip
        for patch in args.patch_sizes
    }
    orderer = next(iter(models.values())).orderer
    cfg = resolve_model_data_config(next(iter(models.values())))
    transform = eval_transform(cfg["input_size"][-1], cfg["mean"], cfg["std"])
    dataset = open_dataset(args.dataset, args.split).dataset
    hits = {(patch, spread): [0] * len(args.budgets) for patch in models for spread in args.spreads}
    count = 0
    for images, labels in image_batches(dataset, transform, args.images, args.batch_size):
        count += len(images)
        coarse = models[args.patch_sizes[0]].compute_order(images, grid=orderer.grid)
        with autocast(images.device, "bf16"):
            for (patch, spread), row in hits.items():
                model = models[patch]
                order = coarse.resample(model.patch_embed.grid_size, spread)
                for i, budget in enumerate(args.budgets):
                    model.keep = budget
                    row[i] += int((model(images, order=order).argmax(1) == labels).sum())
    rows = [
        {"patch, px": patch, "spread": f"{spread:g}"}
        | {f"{budget} tokens": f"{n / count:.1%}" for budget, n in zip(args.budgets, row)}
        for (patch, spread), row in hits.items()
    ]
    text = [
        f"Top-1 of {Path(args.model).name} resampled to smaller patches, no training, on {count} validation images "
        f"of {Path(args.dataset).name} (standard error about {(0.16 * 0.84 / count) ** 0.5:.1%}; the rows see the same "
        f"images), fed by the orders of its orderer on {orderer.grid[0]} x {orderer.grid[1]} patches, spread over the "
        "finer grid.",
        markdown_table(rows),
    ]
    numbers = {f"{patch} {spread:g}": [n / count for n in row] for (patch, spread), row in hits.items()}
    write_section(f"spread_{args.name}", f"Orders spread over smaller patches: {args.name}", "\n\n".join(text), numbers)
    print("\n\n".join(text))


if __name__ == "__main__":
    main()
