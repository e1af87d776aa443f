"""CoMAE ablation, as in Table 1 of the paper, and what can be made of its graphs.

    python benchmarks/comae.py --judge runs/judge64 --dataset data/tiny-imagenet-100 --images 300 --few 100 \
        --runs bundled=comae_tiny "seed 0=runs/comae_s0" "seed 1=runs/comae_s1" "no contrastive=runs/comae_nocon" \
        --seeds "seed 0" "seed 1" --ranker collapse_ranker_tiny
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

import timm
import torch
from torch import Tensor
from tqdm.auto import tqdm

import timm_collapse  # noqa: F401  (registers the models)
from timm_collapse import CollapseOrder, CoMAE, Order
from timm_collapse.data import eval_transform, open_dataset
from timm_collapse.evaluation import uncertainty_curve
from timm_collapse.evaluation.report import markdown_table, write_section
from timm_collapse.evaluation.uncertainty import visible_counts
from timm_collapse.models.registry import load_model
from timm_collapse.models.transformer import use_plain_attention
from timm_collapse.order import RANKINGS, image_dependence, rank_graph, spearman

BATCH, POINTS = 10, 7
EVIDENCE = {  # what is ranked: which graph, and what says how much there is to know about each patch
    "weights": ("weights", ""),
    "weights, scale": ("weights", "expected"),
    "weights, beta": ("weights", "unknown"),
    "errors": ("errors", ""),
    "errors, beta": ("errors", "unknown"),
}


class Graphs(NamedTuple):
    """Of B images: the weights, the graph of the errors, beta, what is left of it, and what was expected to be left.

    Of a ranker only the second and the third.
    """

    weights: Tensor | None
    errors: Tensor
    unknown: Tensor
    left: Tensor | None
    expected: Tensor | None

    def ranked(self, ranking: str, evidence: str) -> Tensor:
        graph, beta = EVIDENCE[evidence]
        return rank_graph(getattr(self, graph), ranking, personalization=getattr(self, beta) if beta else None)


class Measure:
    """Areas against random order, of the first images."""

    def __init__(self, judge, images: Tensor):
        self.judge, self.images = judge, images
        self.grid = judge.tokenizer.grid(images.shape[-2:])
        self.visible = visible_counts(self.grid[0] * self.grid[1], POINTS)
        self.random = self.curve(CollapseOrder.baseline("random", seed=0)(images, self.grid))

    def curve(self, order: Order):
        with torch.autocast("cpu", torch.bfloat16):
            return uncertainty_curve(self.judge, self.images[: len(order)], order, self.visible)

    def area(self, scores: Tensor) -> float:
        areas = self.curve(Order(scores, self.grid)).areas
        return float(areas.mean() / self.random.areas[: len(areas)].mean() - 1)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--runs", nargs="+", required=True, metavar="NAME=SOURCE", help="registered names or folders; first the default"
    )
    add("--seeds", nargs="*", default=[], metavar="NAME", help="two of them that differ by their seed alone")
    add("--ranker", default="", help="registered name or folder, whose graph is ranked, too")
    add("--judge", required=True, help="folder of a reconstructor (train/reconstructor.py)")
    add("--dataset", default="digits")
    add("--split", default="validation")
    add("--images", type=int, default=300, help="for the default")
    add("--few", type=int, default=100, help="for the others")
    add("--note", default="", help="text under the tables: how judge and models were trained")
    args = parser.parse_args()

    judge = timm.create_model(f"local-dir:{args.judge}", pretrained=True).eval()
    use_plain_attention(judge)
    cfg = judge.pretrained_cfg
    dataset = open_dataset(args.dataset, args.split).dataset
    args.images = min(args.images, len(dataset))
    transform = eval_transform(judge.img_size, cfg["mean"], cfg["std"])
    # every part of them is spread over the classes
    index = torch.arange(args.images) * len(dataset) // args.images
    index = index[torch.randperm(args.images, generator=torch.Generator().manual_seed(0))]
    measure = Measure(judge, torch.stack([transform(dataset[int(i)][0]) for i in index]))

    sources = dict(run.split("=", 1) for run in args.runs)
    default = next(iter(sources))
    described, ranked, data, kept = [], [], {}, {}
    for name, source in tqdm(sources.items(), desc="runs"):
        images = measure.images[: None if name == default else args.few]
        model = load_model(source, "runs").requires_grad_(False)
        use_plain_attention(model)
        graphs = kept[name] = graphs_of(model, images)
        data[name] = {**losses(model, images[: args.few]), **describe(graphs)}
        described.append({"run": name, **{key: f"{value:.3f}" for key, value in data[name].items()}})
        data[name]["areas"] = rank_all(measure, graphs)
        ranked += rows_of(name, data[name]["areas"])
    if args.ranker:
        ranker = CollapseOrder.from_pretrained(args.ranker).model
        graphs = Graphs(None, *ranker.evidence(measure.images[: args.few]), None, None)
        data["ranker"] = {"areas": rank_all(measure, graphs)}
        ranked += rows_of("ranker, its factor model", data["ranker"]["areas"])

    data["oracles"] = oracles(measure, kept[default])
    text = [
        f"{args.images} images of {Path(args.dataset).name} ({args.split}) for {default}, {args.few} for the others. "
        "L1: error of the target under the model's own mask, mean over features; the paper sums. `L1, all seen`: with "
        "all weights 1. `entropy`: H_mask, a target's sum of -w log w. "
        "`cosine`: between the rows of the same target in different images, of the weights and of the graph of the "
        "errors (1 = the row does not see the image). `image`: share of the variance of the logits inside a row that "
        "comes from the image's part, not from the table of positions; the heads of the paper do not tell them apart.",
        markdown_table(described),
        "The graphs ranked: area against random order, lower is better (Spearman between the orders of different "
        "images). `weights`: the encoder's, as published; `errors`: what the decoder's errors owe to each patch; "
        "`beta`: patches count by their error given nothing; `scale`: by the error that the decoder expects. The "
        "ranker's graph is that of its factor model where nothing is seen.",
        markdown_table(ranked),
        f"What the order of {default} is made of, and the baselines on the same images:",
        markdown_table([{"order": name, "area": f"{area:+.1%}"} for name, area in data["oracles"].items()]),
    ]
    if args.seeds:
        pair = [kept[name] for name in args.seeds]
        data["seed_agreement"] = agree = {
            f"{ranking} ({evidence})": agreement(*pair, ranking, evidence, measure.grid)
            for evidence in ("weights", "errors, beta")
            for ranking in RANKINGS
        }
        listed = ", ".join(f"{ranking} {value:.2f}" for ranking, value in agree.items())
        text.append(f"Agreement of two training seeds (mean Spearman of their orders of the same image): {listed}.")
    text += [args.note] * bool(args.note)
    write_section("comae", "CoMAE: ablation and rankings", "\n\n".join(text), data)
    print("\n\n".join(text))


def graphs_of(model: CoMAE, images: Tensor) -> Graphs:
    parts = []
    for some in tqdm(images.split(BATCH), desc="graphs", leave=False):
        graph, unknown = model.evidence(some)
        # what one patch tells alone is twice its share: half of all is told by all together
        left = unknown * (0.5 * torch.log1p(-graph).sum(-1)).exp()
        expected = [model.expected(some)] if model.has_scale else []
        parts.append((model.dependency(some), graph, unknown, left, *expected))
    found = [torch.cat(part) for part in zip(*parts)]
    return Graphs(*found, *[None] * (len(Graphs._fields) - len(found)))


def rank_all(measure: Measure, graphs: Graphs) -> dict[str, dict[str, tuple[float, float]]]:
    """By evidence and ranking: the area, and the Spearman correlation between images."""
    found = {}
    for evidence, (graph, beta) in tqdm(EVIDENCE.items(), desc="rankings", leave=False):
        if getattr(graphs, graph) is None or beta and getattr(graphs, beta) is None:
            continue
        scores = {ranking: graphs.ranked(ranking, evidence) for ranking in RANKINGS}
        found[evidence] = {
            ranking: (measure.area(s), image_dependence(Order(s, measure.grid)).pairwise_spearman)
            for ranking, s in scores.items()
        }
    return found


def rows_of(name: str, areas: dict[str, dict[str, tuple[float, float]]]) -> list[dict[str, str]]:
    return [
        {"run": name, "evidence": evidence, **{r: f"{area:+.1%} ({alike:.2f})" for r, (area, alike) in found.items()}}
        for evidence, found in areas.items()
    ]


def oracles(measure: Measure, graphs: Graphs) -> dict[str, float]:
    """Each part alone, or from another image."""
    images, count = measure.images, len(graphs.unknown)
    other = graphs.unknown.roll(1, 0)
    mean = graphs.errors.mean(0, keepdim=True).expand_as(graphs.errors)
    orders = {
        "coverage; errors, beta": graphs.ranked("coverage", "errors, beta"),
        "coverage; errors: the default": graphs.ranked("coverage", "errors"),
        "coverage; mean graph of all images, own beta": rank_graph(mean, "coverage", personalization=graphs.unknown),
        "coverage; own graph, beta of another image": rank_graph(
            graphs.errors, "coverage", personalization=other.contiguous()
        ),
        "coverage; graph and beta of another image": graphs.ranked("coverage", "errors, beta").roll(1, 0),
        "beta alone: error given nothing": graphs.unknown,
        "what is left of it: error given the others": graphs.left,
        "bayer (spread)": CollapseOrder.baseline("bayer")(images[:count], measure.grid).scores,
        "variance": CollapseOrder.baseline("variance")(images[:count], measure.grid).scores,
    }
    if graphs.expected is not None:
        orders["the same, as the decoder expects it"] = graphs.expected
    return {name: measure.area(scores) for name, scores in tqdm(orders.items(), desc="oracles", leave=False)}


def agreement(a: Graphs, b: Graphs, ranking: str, evidence: str, grid: tuple[int, int]) -> float:
    return float(spearman(*(Order(graphs.ranked(ranking, evidence), grid) for graphs in (a, b))).mean())


def losses(model: CoMAE, images: Tensor) -> dict[str, float]:
    """Of sampled targets, under the model's masks and with everything visible."""
    generator = torch.Generator().manual_seed(0)
    n = model.num_patches
    targets = torch.rand(len(images), n, generator=generator).argsort(1)[:, :8]
    noise = torch.randn(len(images), 8, n - 1, model.tokenizer.dim, generator=generator)
    own = model(images, targets, noise)
    seen = model(images, targets, noise, mask=torch.ones(len(images), 8, n - 1))
    position, image = (part.var(-1).mean() for part in model.logits(model.tokenizer(images), targets))
    return {"L1": float(own["l1"]), "L1, all seen": float(seen["l1"]), "entropy": float(own["entropy"]),
            "mean weight": float(own["weight"]), "contrastive": float(own["contrastive"]),
            "image": float(image / (image + position))}  # fmt: skip


def describe(graphs: Graphs) -> dict[str, float]:
    weights = graphs.weights[:, ~torch.eye(graphs.weights.shape[-1], dtype=torch.bool)]
    return {"below .1": float((weights < 0.1).float().mean()), "above .9": float((weights > 0.9).float().mean()),
            "cosine, weights": cosine(graphs.weights), "cosine, errors": cosine(graphs.errors)}  # fmt: skip


def cosine(graph: Tensor) -> float:
    """Between the rows of the same target in different images."""
    rows = torch.nn.functional.normalize(graph, dim=-1)
    return float((rows * rows.roll(1, 0)).sum(-1).mean())


if __name__ == "__main__":
    main()
