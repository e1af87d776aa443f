"""How near a frozen ViT that sees only the first patches of an order comes to its own output on the whole image.

    python benchmarks/feature_orders.py --name tin100 --teacher runs/rvit --dataset data/tiny-imagenet-100 --images 1000

Nothing is trained here: the same weights see different patches.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import timm
import torch
from tqdm.auto import tqdm

import timm_collapse  # noqa: F401  (registers the models)
from timm_collapse import CollapseOrder, Order
from timm_collapse.data import eval_transform, open_dataset
from timm_collapse.evaluation import image_batches
from timm_collapse.evaluation.report import markdown_table, write_section
from timm_collapse.lessons.features import FeatureLesson, output_distance
from timm_collapse.order import BASELINES, image_dependence

KEEPS = (0.5, 0.22, 0.1)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", required=True, help="section of docs/results.md and name of the JSON file")
    parser.add_argument("--teacher", required=True, help="folder of a CViT, best one trained with random orders")
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--split", default="validation")
    parser.add_argument("--images", type=int, default=1000, help="evenly spaced images of the split")
    parser.add_argument(
        "--orderers", nargs="+", default=["collapse_ranker_tiny.tin100_features", "collapse_ranker_tiny.tin100"],
        help="the first one also gets its controls: reversed, of another image, mean map",
    )  # fmt: skip
    parser.add_argument("--remainders", nargs="+", default=["none", "coarse"])
    return parser.parse_args()


@torch.no_grad()
def main() -> None:
    args = parse()
    vit = timm.create_model(f"local-dir:{args.teacher}", pretrained=True)
    cfg = vit.pretrained_cfg
    transform = eval_transform(vit.patch_embed.img_size[0], cfg["mean"], cfg["std"])
    batches = list(image_batches(open_dataset(args.dataset, args.split).dataset, transform, args.images, 250))
    FeatureLesson(vit)  # freezes it
    images, labels = (torch.cat(parts) for parts in zip(*batches))
    with torch.autocast(images.device.type, torch.bfloat16):
        orders = make_orders(args.orderers, vit, images)
        text, numbers = [], {}
        whole = output(vit, images, 1.0)
        for remainder in args.remainders:
            vit.remainder = remainder
            found = {
                name: measure(vit, images, labels, order, whole) for name, order in tqdm(orders.items(), desc=remainder)
            }
            numbers[remainder] = found
            rows = [
                {
                    "order": name,
                    **{f"at {keep:.0%}": "{:.3f} ({:.1f})".format(*found[name][str(keep)]) for keep in KEEPS},
                }
                for name in sorted(found, key=lambda name: found[name]["0.22"][0])
            ]
            text.append(f"Remainder: {remainder}.\n\n{markdown_table(rows)}")
    accuracy, first = top1(whole, labels), orders[args.orderers[0]]
    numbers["image_spearman"] = image_dependence(first).pairwise_spearman
    head = (
        f"{len(images)} images of {Path(args.dataset).name} ({args.split}). Root of the Kullback-Leibler divergence "
        f"from the frozen ViT's own output on the whole image (lower is better), and in brackets its top-1 accuracy in "
        f"per cent ({accuracy:.1f} on the whole image). Orders of {args.orderers[0]} of different images: Spearman "
        f"{numbers['image_spearman']:.3f}."
    )
    data = {"whole_image_top1": accuracy, "images": len(images), "orders": numbers}
    write_section(f"features_{args.name}", f"Recovering a ViT's output: {args.name}", "\n\n".join([head, *text]), data)
    print("\n\n".join([head, *text]))


def make_orders(names: list[str], vit, images: torch.Tensor) -> dict[str, Order]:
    grid = tuple(vit.patch_embed.grid_size)
    orders = {name: CollapseOrder.baseline(name)(images, grid) for name in BASELINES}
    for name in names:
        timm_collapse.collapse(vit, name, remainder="none")
        orders[name] = Order.cat([vit.compute_order(part) for part in tqdm(images.split(100), desc=name, leave=False)])
    first, count = orders[names[0]], len(images)
    orders[f"{names[0]}, reversed"] = first.reversed()
    orders[f"{names[0]}, of another image"] = first[torch.arange(count).roll(1)]
    orders[f"{names[0]}, mean map"] = Order(first.scores.mean(0, keepdim=True).expand(count, -1).contiguous(), grid)
    return orders


def measure(vit, images, labels: torch.Tensor, order: Order, whole: torch.Tensor) -> dict[str, list[float]]:
    """Distance from the output on whole images, and accuracy, at each keep."""
    found = {}
    for keep in KEEPS:
        seen = output(vit, images, keep, order)
        found[str(keep)] = [output_distance(seen, whole, vit.num_classes).mean().item(), top1(seen, labels)]
    return found


def output(vit, images: torch.Tensor, keep: float, order: Order | None = None) -> torch.Tensor:
    vit.keep = keep
    starts = range(0, len(images), 250)
    return torch.cat([vit(images[i : i + 250], order=order and order[slice(i, i + 250)]).float() for i in starts])


def top1(logits: torch.Tensor, labels: torch.Tensor) -> float:
    return 100 * (logits.argmax(1) == labels).float().mean().item()


if __name__ == "__main__":
    main()
