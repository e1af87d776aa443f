"""The whole way in miniature, offline on scikit-learn's digits: CoMAE, the ranker, and what their orders are worth."""

from __future__ import annotations

from pathlib import Path

import timm
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from .data import eval_transform, open_dataset, train_transform
from .engine import Run, TrainArgs
from .evaluation import UncertaintyCurve, uncertainty_curve
from .hub.save import save_model
from .lessons.comae import alternate
from .lessons.pixels import Lesson
from .models import CollapseOrder
from .models.normalisation import Normalisation
from .models.registry import TIN_MEAN, TIN_STD
from .order import Order, image_dependence, spearman
from .plots import plot_class_heatmap, plot_dependency, plot_order, plot_training, plot_uncertainty, save

SIZE, PATCH = 16, 2  # 8 px digits, enlarged twice: a grid of 8 x 8 patches
SHAPE = {"img_size": SIZE, "patch_size": PATCH}
SMALL = {**SHAPE, "dim": 64, "depth": 2, "decoder_dim": 64, "decoder_depth": 2}


def quickstart(output: str | Path = "runs/quickstart", seed: int = 0, steps: int = 250) -> dict[str, float]:
    """Train a small CoMAE and a ranker on digits, measure their orders, save models and pictures.

    Args:
        output: Folder for everything that is made.
        seed: Seed of all trainings.
        steps: Training length of each of the four small models.

    Returns:
        Area under the uncertainty curve of each order, relative to random order (-.1 = 10% less).
    """
    output, console = Path(output), Console()
    torch.manual_seed(seed)
    torch.set_float32_matmul_precision("high")
    console.print("[bold]1/4[/] Two masked reconstructors: one to learn from, and a judge that no orderer will see")
    environment = _train_reconstructor(output / "environment", "0/2", seed + 1, steps)
    judge = _train_reconstructor(output / "judge", "1/2", seed + 2, steps)

    console.print("[bold]2/4[/] CoMAE: for every patch, how much each other patch is needed to reconstruct it")
    images, labels = _validation_images()
    comae = timm.create_model("comae_tiny", **SMALL)
    before = _polarised(CollapseOrder(comae).graph(images[:64]))
    comae.requires_grad_(True)
    run = _run(comae, output / "comae", "0/2", seed, steps, batch_size=16)
    for batch, _ in run:
        arguments, frozen = alternate(run.bare, batch, run, num_targets=8)
        out = run.model(batch, **arguments)
        run.step(out["loss"], out if arguments["mask"] is None else {"l1_random": out["l1"]}, frozen)
    comae = _finished(run)
    exact = CollapseOrder(comae)
    after = _polarised(exact.graph(images[:64]))
    console.print(
        f"    masks polarise: {before:.0%} of all weights below .1 or above .9 before training, {after:.0%} after"
    )

    console.print("[bold]3/4[/] Ranker: the order in one cheap pass, learned from the errors that are left")
    run = _run(
        timm.create_model("collapse_ranker_tiny", **SHAPE, dim=64, depth=2), output / "ranker", "0/2", seed, steps
    )
    lesson = Lesson(environment.to(run.accelerator.device))
    for batch, _ in run:
        own = run.progress > 0.1 and run.random.uniform() < 0.4
        out = run.model(batch, *lesson(batch, run.random, run.bare if own else None))
        run.step(out["loss"], out)
    ranker = CollapseOrder(_finished(run))

    console.print("[bold]4/4[/] What is left unknown after the first k patches, told by the judge on unseen digits")
    orders = {
        "random": CollapseOrder.baseline("random", seed=seed)(images, (8, 8)),
        "bayer (spread)": CollapseOrder.baseline("bayer")(images, (8, 8)),
        "collapse (CoMAE)": exact(images),
        "reversed (CoMAE)": exact(images).reversed(),
        "collapse (ranker)": ranker(images),
        "reversed (ranker)": ranker(images).reversed(),
    }
    curves = {name: uncertainty_curve(judge, images, order) for name, order in orders.items()}
    areas = _report(console, curves)
    agreement = spearman(orders["collapse (ranker)"], orders["collapse (CoMAE)"]).mean()
    console.print(f"    ranker and exact order agree with Spearman {agreement:.2f}; orders of different digits, with "
                  f"{image_dependence(orders['collapse (ranker)']).pairwise_spearman:.2f}")  # fmt: skip
    _pictures(output, images[0], orders["collapse (ranker)"][0], curves)
    target = 27  # a patch near the centre
    save(plot_dependency(_picture(images[0]), exact.graph(images[:1])[0, target], target, (8, 8)),
         output / "dependency.png")  # fmt: skip
    by_class = {str(c): orders["collapse (ranker)"][(labels == c).nonzero().flatten()] for c in range(10)}
    save(plot_class_heatmap(by_class), output / "classes.png")
    console.print(
        f"Saved in {output}: order.png, uncertainty.png, dependency.png, classes.png, comae.png, and the models."
    )
    return areas


def _run(model: nn.Module, folder: Path, part: str, seed: int, steps: int, batch_size: int = 32) -> Run:
    args = TrainArgs(output=str(folder), steps=steps, batch_size=batch_size, lr=2e-3, ema=0.99, seed=seed,
                     resume="none", tensorboard=False)  # fmt: skip
    transform = train_transform(SIZE, TIN_MEAN, TIN_STD, scale=(0.7, 1.0), flip=False)
    return Run(args, model, open_dataset("digits", "train", part).dataset, transform, find_unused=True)


def _finished(run: Run) -> nn.Module:
    model = run.finish().cpu()
    save_model(model, run.output, recipe=run.args)
    return model


def _train_reconstructor(folder: Path, part: str, seed: int, steps: int) -> nn.Module:
    run = _run(timm.create_model("collapse_reconstructor_tiny", **SMALL), folder, part, seed, steps)
    for images, _ in run:
        out = run.model(images, run.random.rand(len(images), 64), run.random.randint(0, 64))
        run.step(out["loss"], out)
    return _finished(run)


def _polarised(graph: Tensor) -> float:
    """Share of the weights off the diagonal that are below .1 or above .9."""
    weights = graph[:, ~torch.eye(graph.shape[-1], dtype=torch.bool, device=graph.device)]
    return float(((weights < 0.1) | (weights > 0.9)).float().mean())


def _validation_images(count: int = 120) -> tuple[Tensor, Tensor]:
    dataset, transform = open_dataset("digits", "validation").dataset, eval_transform(SIZE, TIN_MEAN, TIN_STD)
    samples = [dataset[i] for i in range(count)]
    return torch.stack([transform(image) for image, _ in samples]), torch.tensor([label for _, label in samples])


def _report(console: Console, curves: dict[str, UncertaintyCurve]) -> dict[str, float]:
    random = curves["random"]
    table = Table("order", "area", "against random", "error at 6 of 64", "14", "32")
    for name, curve in curves.items():
        values = [f"{curve.at(k):.3f}" for k in (6, 14, 32)]
        table.add_row(name, f"{curve.area:.3f}", f"{curve.area / random.area - 1:+.1%}", *values)
    console.print(table)
    return {name: curve.area / random.area - 1 for name, curve in curves.items()}


def _picture(image: Tensor) -> Tensor:
    """A normalised image (3, H, W) back in [0, 1]."""
    return Normalisation(TIN_MEAN, TIN_STD).undo(image).clamp(0, 1)


def _pictures(output: Path, image: Tensor, order: Order, curves: dict[str, UncertaintyCurve]) -> None:
    save(plot_order(_picture(image), order), output / "order.png")
    save(plot_uncertainty({name: curve.error.numpy() for name, curve in curves.items()}), output / "uncertainty.png")
    save(plot_training(output / "comae" / "log.jsonl", keys=("l1", "entropy", "weight")), output / "comae.png")
