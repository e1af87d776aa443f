"""CoMAE ablation, as in Table 1 of the paper, and what can be made of its graphs.

    python benchmarks/comae.py --judge runs/judge64 --dataset data/tiny-imagenet-100 \
        --runs "default=runs/comae_s0" "no contrastive=runs/comae_nocon" --seeds runs/comae_s0 runs/comae_s1
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import timm
import torch
from tqdm.auto import tqdm

import timm_collapse  # noqa: F401  (registers the models)
from timm_collapse import CollapseOrder, Order
from timm_collapse.data import eval_transform, open_dataset
from timm_collapse.evaluation import uncertainty_curve
from timm_collapse.evaluation.report import markdown_table, write_section
from timm_collapse.evaluation.uncertainty import visible_counts
from timm_collapse.order import image_dependence, rank_graph, spearman
from timm_collapse.plots import plot_training, save

RANKINGS = ("pagerank", "coverage", "in_degree", "transposed")


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", required=True, metavar="NAME=FOLDER", help="trainings of equal budget")
    parser.add_argument("--seeds", nargs="*", default=[], help="folders of trainings that differ by their seed")
    parser.add_argument("--judge", required=True, help="folder of a reconstructor (train/reconstructor.py)")
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--split", default="validation")
    parser.add_argument("--images", type=int, default=128)
    args = parser.parse_args()

    judge = timm.create_model(f"local-dir:{args.judge}", pretrained=True).eval()
    cfg = judge.pretrained_cfg
    dataset = open_dataset(args.dataset, args.split).dataset
    args.images = min(args.images, len(dataset))
    transform = eval_transform(judge.img_size, cfg["mean"], cfg["std"])
    images = torch.stack([transform(dataset[i * len(dataset) // args.images][0]) for i in range(args.images)])
    grid = judge.tokenizer.grid((judge.img_size, judge.img_size))
    visible = visible_counts(grid[0] * grid[1], 16)
    random = uncertainty_curve(judge, images, CollapseOrder.baseline("random")(images, grid), visible)

    folders = dict(run.split("=", 1) for run in args.runs)
    rows, ranked, data = [], [], {}
    for name, folder in tqdm(folders.items(), desc="runs"):
        model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        graph = torch.cat([model.dependency(part) for part in images.split(16)])
        found = {**losses(model, images), **describe(graph)}
        data[name] = found
        rows.append({"run": name, **{key: f"{value:.3f}" for key, value in found.items()}})
        areas = {}
        for ranking in RANKINGS:
            order = Order(rank_graph(graph, ranking), grid)
            curve = uncertainty_curve(judge, images, order, visible)
            areas[ranking] = {"area": curve.area / random.area - 1, "sum": curve.sum_area / random.sum_area - 1,
                              "image_spearman": image_dependence(order).pairwise_spearman}  # fmt: skip
        data[name]["rankings"] = areas
        ranked.append(
            {
                "run": name,
                **{r: f"{v['area']:+.1%} / {v['sum']:+.1%} ({v['image_spearman']:.2f})" for r, v in areas.items()},
            }
        )
        save(
            plot_training(Path(folder) / "log.jsonl", keys=("l1", "entropy", "weight")),
            f"docs/comae_{Path(folder).name}.png",
        )

    steps = json.loads((Path(next(iter(folders.values()))) / "recipe.json").read_text())["arguments"]["steps"]
    text = [
        f"{args.images} images of {Path(args.dataset).name} ({args.split}); all runs {steps} steps, the same data "
        "and seeds. L1: error of the target under the model's own mask, mean over features; the paper sums. `L1, all "
        "seen`: with all weights 1. `entropy`: H_mask, a target's sum of -w log w. `static`: mean cosine between the "
        "rows of the same target in different images (1 = the mask does not see the image).",
        markdown_table(rows),
        "The same graphs ranked: area against random order, of mean / summed hidden error (Spearman between the orders "
        "of different images).",
        markdown_table(ranked),
    ]
    if len(args.seeds) > 1:
        models = [timm.create_model(f"local-dir:{folder}", pretrained=True).eval() for folder in args.seeds[:2]]
        graphs = [torch.cat([model.dependency(part) for part in images.split(16)]) for model in models]
        agree = {r: float(spearman(*(Order(rank_graph(g, r), grid) for g in graphs)).mean()) for r in RANKINGS}
        data["seed_agreement"] = agree
        listed = ", ".join(f"{ranking} {value:.2f}" for ranking, value in agree.items())
        text.append(f"Agreement of two training seeds (mean Spearman of their orders of the same image): {listed}.")
    write_section("comae", "CoMAE: ablation and rankings", "\n\n".join(text), data)
    print("\n\n".join(text))


def losses(model, images: torch.Tensor) -> dict[str, float]:
    """L1 of sampled targets under the model's masks and with everything visible."""
    generator = torch.Generator().manual_seed(0)
    n = model.num_patches
    targets = torch.rand(len(images), n, generator=generator).argsort(1)[:, :8]
    noise = torch.randn(len(images), 8, n - 1, model.tokenizer.dim, generator=generator)
    own = model(images, targets, noise)
    seen = model(images, targets, noise, mask=torch.ones(len(images), 8, n - 1))
    return {"L1": float(own["l1"]), "L1, all seen": float(seen["l1"]), "entropy": float(own["entropy"]),
            "mean weight": float(own["weight"]), "contrastive": float(own["contrastive"])}  # fmt: skip


def describe(graph: torch.Tensor) -> dict[str, float]:
    weights = graph[:, ~torch.eye(graph.shape[-1], dtype=torch.bool)]
    rows = torch.nn.functional.normalize(graph, dim=-1)
    return {"below .1": float((weights < 0.1).float().mean()), "above .9": float((weights > 0.9).float().mean()),
            "static": float((rows * rows.roll(1, 0)).sum(-1).mean())}  # fmt: skip


if __name__ == "__main__":
    main()
