"""What orders are worth: the uncertainty that is left after the first k patches, told by a judge that no orderer saw.

    python benchmarks/orders.py --name tin100 --judge runs/judge64 --dataset data/tiny-imagenet-100 --images 500 \
        --ranker collapse_ranker_tiny --comae comae_tiny --oracle 12

With several rankers, what each costs stands beside; what one is given instead of its own follows its name:
--ranker collapse_ranker_tiny_224 "collapse_ranker_tiny_224 spread_first=.13 phases=0,.23,.4,.62"
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
from timm_collapse.evaluation import count_launches, count_macs, greedy_oracle, images_per_second, uncertainty_curve
from timm_collapse.evaluation.report import markdown_table, write_section
from timm_collapse.evaluation.uncertainty import visible_counts
from timm_collapse.models.normalisation import Normalisation
from timm_collapse.order import BASELINES, RANKINGS, image_dependence, rank_graph, spearman
from timm_collapse.plots import plot_uncertainty, save


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", required=True, help="section of docs/results.md and name of the JSON file")
    parser.add_argument("--judge", required=True, help="folder of a reconstructor (train/reconstructor.py)")
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--split", default="validation")
    parser.add_argument("--part", default="", help="'i/n' or '!i/n' of the split")
    parser.add_argument("--images", type=int, default=500, help="evenly spaced images of the split")
    parser.add_argument(
        "--points", type=int, default=20, help="numbers of visible patches that are measured; 0 for all"
    )
    parser.add_argument("--ranker", nargs="+", default=["collapse_ranker_tiny"], help="registered names or folders")
    parser.add_argument("--comae", default="", help="registered name or folder; empty for none")
    parser.add_argument("--oracle", type=int, default=0, help="images for the greedy oracle (slow)")
    parser.add_argument("--random-seeds", type=int, default=3)
    parser.add_argument("--note", default="", help="text under the table: how judge and orderers were trained")
    return parser.parse_args()


@torch.no_grad()
def main() -> None:
    args = parse()
    judge = timm.create_model(f"local-dir:{args.judge}", pretrained=True).eval()
    cfg = judge.pretrained_cfg
    dataset = open_dataset(args.dataset, args.split, args.part).dataset
    transform = eval_transform(judge.img_size, cfg["mean"], cfg["std"])
    count = min(args.images, len(dataset))
    images = torch.stack([transform(dataset[i * len(dataset) // count][0]) for i in range(count)])
    grid = judge.tokenizer.grid((judge.img_size, judge.img_size))
    visible = visible_counts(grid[0] * grid[1], args.points)

    orders: dict[str, Order] = {}
    for seed in range(args.random_seeds):
        orders[f"random {seed}"] = CollapseOrder.baseline("random", seed=seed)(images, grid)
    for name in BASELINES:
        if name != "random":
            orders[name] = CollapseOrder.baseline(name)(images, grid)
    rankers = {"ranker" if i == 0 else name: load(name) for i, name in enumerate(args.ranker)}
    orders |= {name: ordered(ranker, images, cfg, grid) for name, ranker in rankers.items()}
    orders["ranker, of another image"] = orders["ranker"][torch.arange(count).roll(1)]
    mean_map = orders["ranker"].scores.mean(0, keepdim=True).expand(count, -1)
    orders["ranker, mean map of all images"] = Order(mean_map.contiguous(), grid)
    orders["ranker, reversed"] = orders["ranker"].reversed()
    if args.comae:
        comae = CollapseOrder.from_pretrained(args.comae)
        seen = Normalisation.of(cfg).to(Normalisation.of(comae), images)
        parts = [comae.dependencies(part) for part in tqdm(seen.split(16), desc="CoMAE", leave=False)]
        graph, unknown = (torch.cat(part) for part in zip(*parts))
        for ranking in RANKINGS:
            scores = rank_graph(graph, ranking, personalization=unknown)
            orders[f"CoMAE, {ranking}"] = Order(scores, comae.grid).resample(grid, comae.spread)
        published = CollapseOrder.from_pretrained(args.comae, ranking="pagerank", evidence="weights")
        orders["CoMAE, as published"] = ordered(published, images, cfg, grid)
        orders["CoMAE, coverage, reversed"] = orders["CoMAE, coverage"].reversed()

    curves = {n: measure(judge, images, o, visible) for n, o in tqdm(orders.items(), desc="orders")}
    random = [curves.pop(f"random {seed}") for seed in range(args.random_seeds)]
    reference = {
        "area": sum(c.area for c in random) / len(random),
        "sum": sum(c.sum_area for c in random) / len(random),
        "entropy": sum(c.entropy_area for c in random) / len(random),
        "cross_entropy": sum(c.cross_entropy_area for c in random) / len(random),
        **{k: sum(c.at(k) for c in random) / len(random) for k in shares(grid)},
    }
    spread = max(abs(c.area / reference["area"] - 1) for c in random)
    numbers = {"random": {name: reference[name] for name in ("area", "sum", "entropy", "cross_entropy")}}
    rows = [{"order": f"random (mean of {len(random)}, spread {spread:.1%})", "area": f"{reference['area']:.4f}",
             "summed": f"{reference['sum']:.4f}", **{f"at {k}": f"{reference[k]:.4f}" for k in shares(grid)},
             "entropy": f"{reference['entropy']:.4f}", "cross-entropy": f"{reference['cross_entropy']:.4f}",
             "Spearman between images": "0"}]  # fmt: skip
    for name, curve in sorted(curves.items(), key=lambda item: item[1].area):
        found = {"area": curve.area / reference["area"] - 1, "sum": curve.sum_area / reference["sum"] - 1,
                 **{f"at {k}": curve.at(k) / reference[k] - 1 for k in shares(grid)},
                 "standard_error": float((curve.areas / random[0].areas).std() / count**0.5),
                 "entropy": curve.entropy_area - reference["entropy"],
                 "cross_entropy": curve.cross_entropy_area - reference["cross_entropy"],
                 "image_spearman": image_dependence(orders[name]).pairwise_spearman}  # fmt: skip
        numbers[name] = found
        rows.append({"order": name, "area": f"{found['area']:+.1%}", "summed": f"{found['sum']:+.1%}",
                     **{f"at {k}": f"{found[f'at {k}']:+.1%}" for k in shares(grid)},
                     "entropy": f"{found['entropy']:+.4f}", "cross-entropy": f"{found['cross_entropy']:+.4f}",
                     "Spearman between images": f"{found['image_spearman']:.3f}"})  # fmt: skip
    text = [
        f"{count} images of {Path(args.dataset).name} ({args.split}{', part ' + args.part if args.part else ''}), grid "
        f"{grid[0]} x {grid[1]}. `area`: mean over the number k of visible patches of the mean L1 error of the hidden "
        "ones; `summed`: of their summed error (Definition 1 of the paper: early k weigh more); `at k`: error at k "
        "visible patches; all relative to random order, lower is better. `entropy`: mean over k of the summed Laplace "
        "entropy of the hidden patches, nats a feature, difference to random: what the judge believes. "
        "`cross-entropy`: the same of their negative log-likelihood: what they really cost.",
        markdown_table(rows),
    ]
    if len(rankers) > 1:
        text.append(costs_text(rankers, shares(grid)[1], numbers))
    if args.comae:
        agree = {r: float(spearman(orders["ranker"], orders[f"CoMAE, {r}"]).mean()) for r in RANKINGS}
        numbers["ranker_to_exact_spearman"] = agree
        listed = ", ".join(f"{ranking} {value:.2f}" for ranking, value in agree.items())
        text.append(f"Spearman of the ranker's order with the exact order of CoMAE's graph, same image: {listed}.")
    if args.oracle:
        text.append(oracle_text(args, judge, images, orders, curves, visible, numbers))
    if args.note:
        text.append(args.note)
    write_section(
        f"orders_{args.name}", f"Orders: {args.name}", "\n\n".join(text), {"visible": visible, "orders": numbers}
    )
    if len(rankers) == 1:
        shown = {"random": random[0], **{n: c for n, c in curves.items() if "another" not in n and "mean map" not in n}}
        figure = plot_uncertainty({n: c.error.numpy() for n, c in shown.items()}, visible=visible)
        save(figure, Path("docs") / f"orders_{args.name}.png")
    print("\n\n".join(text))


def load(spec: str) -> CollapseOrder:
    """A ranker from its name and, after spaces, what it is given instead of its own."""
    name, *given = spec.split()
    values = {
        key: [float(number) for number in value.split(",")] for key, _, value in (g.partition("=") for g in given)
    }
    return CollapseOrder.from_pretrained(name, **{k: tuple(v) if k == "phases" else v[0] for k, v in values.items()})


def costs_text(rankers: dict[str, CollapseOrder], upto: int, numbers: dict, batch: int = 8, runs: int = 7) -> str:
    """What the first `upto` patches cost; also written into `numbers`."""
    images = torch.randn(batch, 3, 224, 224)
    calls = {name: lambda model=ranker.model: model.rank(images, upto=upto) for name, ranker in rankers.items()}
    speeds, rows = images_per_second(calls, batch, runs), []
    for name, call in calls.items():
        cost = {"passes": sum(start < upto for start in rankers[name].model.starts()),
                "gmacs": count_macs(call) / batch / 1e9, "launches": count_launches(call),
                "time": speeds["ranker"] / speeds[name]}  # fmt: skip
        numbers[name] |= cost
        rows.append({"order": name, "passes": cost["passes"], "GMACs an image": f"{cost['gmacs']:.3f}",
                     "launches": cost["launches"], "time": f"{cost['time']:.2f}"})  # fmt: skip
    return (f"Cost of the first {upto} places from pictures of 224 px: passes of the network that is told what is "
            f"visible, multiply-accumulates, launches, and time, batch {batch}, relative to the first ranker (median "
            f"of {runs} runs in turn).\n\n{markdown_table(rows)}")  # fmt: skip


def ordered(orderer: CollapseOrder, images: torch.Tensor, cfg: dict, grid: tuple[int, int]) -> Order:
    """Orders of images given in the judge's normalisation."""
    images = Normalisation.of(cfg).to(Normalisation.of(orderer), images)
    return Order.cat([orderer(part, grid=grid) for part in tqdm(images.split(32), desc="ordering", leave=False)])


def measure(judge, images, order, visible):
    with torch.autocast(images.device.type, torch.bfloat16):
        return uncertainty_curve(judge, images, order, visible)


def shares(grid: tuple[int, int]) -> list[int]:
    return [round(grid[0] * grid[1] * k / 64) for k in (6, 14, 32)]


def oracle_text(args, judge, images, orders, curves, visible, numbers) -> str:
    chosen = torch.arange(args.oracle) * (len(images) // args.oracle)
    few = images[chosen]
    oracle = Order.cat([greedy_oracle(judge, image) for image in tqdm(few.split(1), desc="oracle")])
    randoms = [f"random {seed}" for seed in range(args.random_seeds)]
    names = [*randoms, "bayer", "halton", "variance", "centre_variance", "gradient", "ranker"]
    area = {name: measure(judge, few, orders[name][chosen], visible).area for name in names if name in orders}
    base = sum(area.pop(name) for name in randoms) / len(randoms)
    area["greedy oracle"] = measure(judge, few, oracle, visible).area
    relative = {name: value / base - 1 for name, value in area.items()}
    best = min((n for n in relative if n not in ("ranker", "greedy oracle")), key=relative.get)
    way = (relative[best] - relative["ranker"]) / (relative[best] - relative["greedy oracle"])
    numbers["oracle"] = {**relative, "images": args.oracle, "way_from_best_baseline": way}
    listed = ", ".join(f"{name} {value:+.1%}" for name, value in sorted(relative.items(), key=lambda item: item[1]))
    return (f"Greedy oracle (sees the judge's true errors), {args.oracle} images, area against random: {listed}. The "
            f"ranker covers {way:.0%} of the way from the best baseline ({best}) to the oracle.")  # fmt: skip


if __name__ == "__main__":
    main()
