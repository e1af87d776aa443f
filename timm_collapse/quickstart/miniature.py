"""The way there in miniature: CoMAE and a ranker, trained on crops of one photo and judged on another."""

from __future__ import annotations

from pathlib import Path

import timm
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor, nn

from ..engine import Run, TrainArgs
from ..hub.save import save_model
from ..lessons.comae import alternate
from ..lessons.imitation import Imitation
from ..models import CollapseOrder, CoMAE
from ..models.normalisation import Normalisation
from ..models.tokenizer import resize_images
from ..order import image_dependence
from ..plots import plot_dependency, plot_training, save
from .measure import compare, random_crops

SIZE, PATCH, GRID = 64, 8, (8, 8)
SMALL = {"img_size": SIZE, "patch_size": PATCH, "dim": 64, "depth": 2}
COMAE, TEACHER = "comae_tiny", "collapse_ranker_tiny"
SCALE = (0.1, 0.5)  # of the photo's area
POOL, CROPS = 512, 32  # crops to learn from, and to judge


def train_in_miniature(
    console: Console, learnt: Image.Image, unseen: Image.Image, output: Path, seed: int, steps: int
) -> dict[str, float]:
    """Trains a CoMAE on and a ranker from scratch, and measures their orders.

    Args:
        console: Where the tables go.
        learnt: The photo that is learned from.
        unseen: The photo that is judged.
        output: Folder of the models and pictures.
        seed: Of all trainings.
        steps: Training length of each model.

    Returns:
        Area under the uncertainty curve of each order, relative to random order.
    """
    torch.manual_seed(seed)
    judge = timm.create_model("collapse_reconstructor_tiny_224", pretrained=True).eval()
    normalisation = Normalisation.of(judge.pretrained_cfg)
    pool = random_crops([learnt], POOL, SIZE, normalisation, seed + 1, SCALE)
    # the judge's patches are of 16 px: it sees the same crops, twice as large
    images = random_crops([unseen], CROPS, SIZE * judge.tokenizer.patch_size // PATCH, normalisation, seed, SCALE)

    console.print(
        "    CoMAE, the slow definition: how much each patch is needed for each other one; from bundled weights"
    )
    untrained = timm.create_model(COMAE).eval()
    comae = _train_comae(pool, output / "comae", seed, steps)
    console.print(
        f"    its masks polarise: {_polarised(comae, images):.0%} of all weights are below .1 or above .9, "
        f"{_polarised(untrained, images):.0%} in an untrained one"
    )
    console.print(f"    a ranker, the fast estimate: from scratch, learned from what {TEACHER} expects")
    ranker = CollapseOrder(_train_ranker(pool, output / "ranker", seed, steps))
    exact = CollapseOrder(comae)
    orders = {
        "random": CollapseOrder.baseline("random", seed=seed)(images, GRID),
        "bayer (spread)": CollapseOrder.baseline("bayer")(images, GRID),
        "CoMAE": exact(images),
        "CoMAE, as published": CollapseOrder(comae, "pagerank", evidence="weights")(images),
        "ranker": ranker(images),
        "ranker, reversed": ranker(images).reversed(),
    }
    areas = compare(console, judge, images, orders, output / "uncertainty_miniature.png")
    alike = {name: image_dependence(orders[name]).pairwise_spearman for name in ("CoMAE", "ranker")}
    console.print(
        f"    orders of different crops agree: Spearman {alike['ranker']:.2f} (ranker), {alike['CoMAE']:.2f} (CoMAE)"
    )
    picture, graph = normalisation.undo(images[0]).clamp(0, 1), exact.graph(images[:1])[0]
    target = int(graph.sum(1).argmax())  # the patch that the others tell most about
    for name, row in (("comae", graph[target]), ("ranker", ranker.graph(images[:1])[0, target])):
        save(plot_dependency(picture, row, target, GRID), output / f"dependency_{name}.png")
    save(plot_training(output / "comae" / "log.jsonl", keys=("l1", "entropy", "weight")), output / "comae.png")
    return areas


def _run(model: nn.Module, pool: Tensor, folder: Path, seed: int, steps: int, batch_size: int, lr: float) -> Run:
    args = TrainArgs(output=str(folder), steps=steps, batch_size=batch_size, lr=lr, ema=0.99, seed=seed,
                     resume="none", tensorboard=False)  # fmt: skip
    return Run(args, model, [(crop, 0) for crop in pool], find_unused=True)


def _finished(run: Run) -> nn.Module:
    model = run.finish().cpu()
    save_model(model, run.output, recipe=run.args)
    return model


def _train_comae(pool: Tensor, folder: Path, seed: int, steps: int) -> nn.Module:
    comae = timm.create_model(COMAE, pretrained=True, decoder_first=0.0)  # its decoder has learned
    run = _run(comae, pool, folder, seed, steps, batch_size=8, lr=5e-4)
    for images, _ in run:
        arguments, frozen = alternate(run.bare, images, run, num_targets=4)
        out = run.model(images, **arguments)
        run.step(out["loss"], out if arguments["mask"] is None else {"l1_random": out["l1"]}, frozen)
    return _finished(run)


def _train_ranker(pool: Tensor, folder: Path, seed: int, steps: int) -> nn.Module:
    run = _run(timm.create_model(TEACHER, **SMALL), pool, folder, seed, steps, batch_size=32, lr=2e-3)
    lesson = Imitation(timm.create_model(TEACHER, pretrained=True).to(run.device))
    for images, _ in run:
        own = run.progress > 0.1 and run.random.uniform() < 0.4
        out = run.model(images, *lesson(images, run.random, run.bare, own))
        run.step(out["loss"], out)
    return _finished(run)


@torch.no_grad()
def _polarised(comae: CoMAE, images: Tensor) -> float:
    """Share of the weights that are below .1 or above .9."""
    weights = comae.dependency(resize_images(images, (SIZE, SIZE)))
    weights = weights[:, ~torch.eye(weights.shape[-1], dtype=torch.bool)]
    return float(((weights < 0.1) | (weights > 0.9)).float().mean())
