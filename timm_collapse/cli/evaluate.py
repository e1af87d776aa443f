"""`timm-collapse evaluate`: accuracy, cost and speed of vision transformers that see only the first patches.

What is heavy is imported inside the functions, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .common import (
    CLASSIFIERS,
    DATASETS,
    ORDERERS,
    add_batches,
    add_device,
    add_precision,
    add_seed,
    check_numbers,
    check_outputs,
    console,
    load_classifier,
    load_orderer,
    open_device,
    worker_count,
    write_json,
)

if TYPE_CHECKING:
    from torch import nn

    from ..data import DatasetInfo
    from ..models import CollapseOrder

REMAINDERS = ("none", "fused", "coarse", "mixed", "split", "zoom")  # of `collapse`, without importing it
DEFAULT_ORDERERS = ("random", "collapse_ranker_tiny_224")
SHOWN = (1.0, 0.7, 0.5, 0.22)  # columns of the table, where more keeps than MAX_COLUMNS are measured: the paper's
MAX_COLUMNS = 6

SUMMARY = "accuracy and speed of ViTs that see only the first patches"
DESCRIPTION = (
    "Measures how accurate a classifier stays when it sees only the first patches of an order. A model that is not "
    "collapsed is collapsed with each orderer, training-free; each image is ordered once for all keeps. Reports top-1 "
    "and top-5 accuracy with standard errors, the mean top-1 over all shares of masked patches (AuC), the knee of the "
    "curve, and what each keep costs: MACs and measured images per second, order included."
)
EXAMPLE = """timm-collapse evaluate --model vit_base_patch16_224.augreg2_in21k_ft_in1k --orderer random \\
      collapse_ranker_tiny_224 --dataset imagenet --split validation --precision bf16 --json table5.json

  the paper's Table 5 (top-1 at 100, 70, 50 and 22% visible, and the AuC), where imagenet/validation/ is a folder of
  1,000 class folders; --images 5000 takes an even sample of it.

  offline, in seconds, with an untrained model:
  timm-collapse evaluate --model cvit_tiny_patch4_32 --no-pretrained --dataset digits --orderer random bayer none"""


class Entry(NamedTuple):
    """One line of the tables: a model with one orderer."""

    model: str
    orderer: str
    remainder: str
    module: nn.Module

    @property
    def label(self) -> str:
        return f"{self.model}, {self.orderer}" + (f", {self.remainder}" if self.remainder not in ("none", "") else "")


def declare(parser: argparse.ArgumentParser) -> None:
    """Arguments of `evaluate`."""
    add = parser.add_argument
    # fmt: off
    add("--model", nargs="+", required=True, metavar="NAME", help=f"classifiers: {CLASSIFIERS}")
    add("--orderer", nargs="+", metavar="NAME",
        help=f"each is {ORDERERS}; or none: the plain model, with all patches (default: a collapsed model's own; for "
        f"any other {' and '.join(DEFAULT_ORDERERS)})")
    add("--remainder", choices=REMAINDERS,
        help="what becomes of the dropped patches (default: a collapsed model's own, else none)")
    add("--pretrained", action=argparse.BooleanOptionalAction, default=True,
        help="--no-pretrained takes random weights, with as many classes as the data set has: for trying out, and "
        "for speed")
    add("--img-size", type=int, metavar="PIXELS", help="side of the images (default: the model's)")
    add("--dataset", required=True, metavar="NAME", help=DATASETS)
    add("--split", default="validation", help="default: %(default)s")
    add("--images", type=int, default=0, metavar="N", help="evenly spaced images of the split; 0 for all (default: 0)")
    add("--keep", nargs="+", metavar="SHARE",
        help="shares of the patches that stay visible, in (0, 1] (default: 14 from 1.0 to 0.01; of more than "
        f"{MAX_COLUMNS}, the table shows 1.0 0.7 0.5 0.22, and files hold all)")
    add_batches(parser)
    add_precision(parser)
    add_device(parser)
    add("--speed-batch", type=int, default=16, metavar="N",
        help="images in a timed batch; 0 measures no speed (default: %(default)s)")
    add("--runs", type=int, default=3, help="timed runs of each, in turn (default: %(default)s)")
    add("--output", default="accuracy.png", metavar="PATH",
        help="the plot, .png, .pdf or .svg (default: %(default)s)")
    add("--json", metavar="PATH", help="also write all numbers; - writes them to stdout, and all else to stderr")
    add("--markdown", metavar="PATH", help="also write the tables")
    add_seed(parser, "random orders and random weights")
    # fmt: on


def run(args: argparse.Namespace) -> None:
    """Measures the curves, draws them and prints the table."""
    import torch

    from ..data import open_dataset
    from ..evaluation import KEEPS, accuracy_curves, costs_over_keep, image_batches
    from ..order import check_keeps, parse_keep
    from ..plots import plot_accuracy, save
    from .evaluate_report import markdown, print_tables, results

    keeps = check_keeps([parse_keep(keep) for keep in args.keep] if args.keep else KEEPS)
    columns = keeps if len(keeps) <= MAX_COLUMNS else [keep for keep in SHOWN if keep in keeps] or keeps
    check_numbers(args, {"batch_size": 1, "images": 0, "speed_batch": 0, "runs": 1, "workers": 0, "img_size": 1})
    check_outputs(args, "json", "markdown")
    device = open_device(args.device)
    info = open_dataset(args.dataset, args.split, labelled=True)
    total = min(args.images or len(info.dataset), len(info.dataset))
    curves, costs, entries = {}, {}, []
    for config, group in load_groups(args, info):
        models = {entry.label: entry.module for entry in group}
        batches = image_batches(info.dataset, _transform(config), total, args.batch_size, worker_count(args))
        curves |= accuracy_curves(models, batches, keeps, args.precision, device, total)
        if args.speed_batch:
            generator = torch.Generator().manual_seed(args.seed)
            images = torch.randn(args.speed_batch, *config["input_size"], generator=generator).to(device)
            costs |= costs_over_keep(models, images, keeps, args.runs, args.precision)
        for model in models.values():
            model.to("cpu")  # room for the next group
        entries += group
    data = results(args, entries, curves, costs, total, device)
    speeds = {name: [cost.images_per_second for cost in row] for name, row in costs.items()}
    save(plot_accuracy(curves, speeds or None), args.output)
    if args.markdown:
        Path(args.markdown).write_text(markdown(data, columns), encoding="utf-8")
    write_json(args.json, data)
    print_tables(console(args), data, columns, args.output)


def load_groups(args: argparse.Namespace, info: DatasetInfo) -> list[tuple[dict[str, Any], list[Entry]]]:
    """All entries; those whose images look alike share one pass over the data.

    A group has orderers of its own, so that a random order does not depend on what else is evaluated.

    Returns:
        Pairs of timm's data config and the entries.

    Raises:
        CollapseError: A model or orderer that cannot be loaded, whose classes are not the data set's, or that cannot
            be collapsed.
    """
    from ..collapse.base import Collapsed
    from ..evaluation import with_orderer
    from ..evaluation.accuracy import plain_model

    names = list(dict.fromkeys(args.model))
    orderers = list(dict.fromkeys(args.orderer or DEFAULT_ORDERERS))
    labels, orderer_labels = _short_names(names), _short_names(orderers)
    groups: dict[str, tuple[dict[str, Any], list[Entry], dict[str, CollapseOrder]]] = {}
    for name in names:
        model = load_model(name, args, info)
        config = _data_config(model, args.img_size)
        grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
        _, entries, loaded = groups.setdefault(repr((config, grid)), (config, [], {}))
        own = isinstance(model, Collapsed)
        if own and not args.orderer:
            remainder = args.remainder or model.remainder
            twin = with_orderer(model, model.orderer, remainder, config["mean"], config["std"])
            entries.append(Entry(labels[name], _orderer_name(model), remainder, twin))
            continue
        for orderer in orderers:
            if orderer == "none":
                entries.append(Entry(labels[name], "none", "", plain_model(model)))
                continue
            if orderer not in loaded:
                loaded[orderer] = load_orderer(orderer, seed=args.seed)
            remainder = args.remainder or (model.remainder if own else "none")
            twin = with_orderer(model, loaded[orderer], remainder, config["mean"], config["std"])
            entries.append(Entry(labels[name], orderer_labels[orderer], remainder, twin))
    return [(config, entries) for config, entries, _ in groups.values()]


def load_model(name: str, args: argparse.Namespace, info: DatasetInfo) -> nn.Module:
    """A classifier by its name, in eval mode.

    Raises:
        CollapseError: Nothing of that name, or a classifier of other classes than the data set's.
    """
    import torch

    from ..order import CollapseError

    kwargs: dict[str, Any] = {"img_size": args.img_size} if args.img_size else {}
    if not args.pretrained and info.num_classes:
        kwargs["num_classes"] = info.num_classes
    torch.manual_seed(args.seed)
    model = load_classifier(name, "--model", args.pretrained, **kwargs)
    if info.num_classes and info.num_classes != model.num_classes:
        raise CollapseError(
            f"--dataset: {args.dataset!r} has {info.num_classes} classes in split {args.split!r}, but the model "
            f"{name!r} has {model.num_classes}: both must be the same"
        )
    return model


def _data_config(model: nn.Module, img_size: int | None) -> dict[str, Any]:
    """timm's data config of a model, at the size that was asked for, which models for any size do not know, or its own.

    Its pretrained_cfg may hold another.
    """
    from timm.data import resolve_model_data_config

    embed = getattr(getattr(model, "encoder", model), "patch_embed", None)
    size = (img_size, img_size) if img_size else getattr(embed, "img_size", None)
    return resolve_model_data_config(model, args={"input_size": (3, *size)} if size else None)


def _transform(config: dict[str, Any]):
    from timm.data import create_transform

    return create_transform(**config, is_training=False)


def _orderer_name(model: nn.Module) -> str:
    orderer = model.orderer
    cfg = getattr(orderer.model, "pretrained_cfg", None) or {}
    return orderer.baseline_name or cfg.get("architecture") or type(orderer.model).__name__


def _short_names(names: list[str]) -> dict[str, str]:
    """Folders by their last two parts, as in reports, unless that makes two names one."""
    from ..evaluation.report import relative_paths

    short = {name: relative_paths(name) for name in names}
    return short if len(set(short.values())) == len(names) else {name: name for name in names}
