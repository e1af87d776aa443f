"""`timm-collapse evaluate-generation`: generated images against real ones.

What is heavy is imported inside the functions, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.utils.data import Dataset

    from ..data import DatasetInfo
    from ..evaluation import Features, FeatureStatistics, GenerationReport, InceptionReport

ROWS = {  # title and what is best, in the order of the table
    "fid": ("FID", "0"),
    "frechet": ("Fréchet distance", "0"),
    "kid": ("kernel distance", "0"),
    "precision": ("precision", "1"),
    "recall": ("recall", "1"),
    "density": ("density", "about 1"),
    "coverage": ("coverage", "1"),
    "inception_score": ("Inception score", "high"),
    "classifier_score": ("classifier score", "high"),
    "label_accuracy": ("label accuracy", "1"),
}

DESCRIPTION = (
    "Measures generated images. With --features, in the features of any timm classifier, offline: Fréchet and kernel "
    "distance to real images, precision, recall, density, coverage, the classifier's score, and how often it sees the "
    "class that was asked for. With --inception, the published metrics through torch-fidelity: FID, Inception score, "
    "KID, precision and recall. Numbers of different feature models cannot be compared; nor can distances at different "
    "numbers of images."
)
EXAMPLE = """timm-collapse evaluate-generation --samples samples/ --features resnet50.a1_in1k \\
      --dataset imagenet --split validation --save-statistics imagenet_resnet50.npz --json generation.json

  FID as published, against ADM's reference batch:
  timm-collapse evaluate-generation --samples samples.npz --inception --reference VIRTUAL_imagenet256_labeled.npz"""


class Reference(NamedTuple):
    """Real images, their statistics, or both."""

    images: Dataset | None
    statistics: FeatureStatistics | None
    info: DatasetInfo | None  # of images that came from a data set


def declare(parser: argparse.ArgumentParser) -> None:
    """Arguments of `evaluate-generation`."""
    from .main import _seed

    add = parser.add_argument
    # fmt: off
    add("--samples", required=True, metavar="PATH",
        help="generated images of one size: a folder of png or jpg files, in subfolders named by class (or class "
        "number) if they were asked for, or an .npz file as ADM's: arr_0 (N, H, W, 3) uint8, labels arr_1 optional")
    network = parser.add_mutually_exclusive_group(required=True)
    network.add_argument("--features", metavar="MODEL",
        help="classifier: any timm name with its tag, hf-hub:<id>, or a local folder that save_for_hf wrote")
    network.add_argument("--inception", action="store_true", help="FID and its kin; needs torch-fidelity")
    add("--inception-weights", metavar="FILE", help="torch-fidelity's weights (default: its download, cached)")
    real = parser.add_mutually_exclusive_group(required=True)
    real.add_argument("--dataset", metavar="NAME",
        help="real images: digits, a folder of parquet files, an image folder, or a timm data set such as hfds/<id>; "
        "they are resized and cropped to the size of the samples")
    real.add_argument("--reference", metavar="FILE",
        help="real images or their statistics: an .npz file of --save-statistics, or with arr_0 or, for --inception, "
        "mu and sigma, as ADM's")
    add("--split", default="validation", help="of --dataset (default: %(default)s)")
    add("--images", type=int, default=0, metavar="N",
        help="evenly spaced images of the split; 0 for all (default: %(default)s)")
    add("--k", type=int, metavar="N",
        help="neighbours of precision, recall, density and coverage (default: 5; 3 with --inception, as ADM)")
    add("--save-statistics", metavar="FILE", help="write the mean and covariance of the real images' features (.npz)")
    add("--batch-size", type=int, default=64, help="default: %(default)s")
    add("--workers", type=int, help="processes that decode images (default: one a core, at most 4)")
    add("--precision", choices=("no", "bf16"), default="no",
        help="of --features; bf16 runs under autocast (default: %(default)s)")
    add("--device", help="such as cpu or cuda:1 (default: a GPU where there is one)")
    add("--seed", type=_seed, default=0, help="of the random subsets of --features (default: %(default)s)")
    add("--json", metavar="PATH", help="also write all numbers; - writes them to stdout, and all else to stderr")
    # fmt: on


def run(args: argparse.Namespace) -> None:
    """Extracts features of generated and real images, compares them and prints the table."""
    from ..data.images import photo_tensor
    from ..evaluation import evaluate_generation, evaluate_inception, extract_features, extract_inception_features
    from ..evaluation.accuracy import image_batches
    from ..evaluation.samples import open_samples
    from .evaluate import _cores, _device

    _check_numbers(args)
    device = _device(args.device)
    samples = open_samples(args.samples)
    reference = open_reference(args)
    labels, note = samples.classes(_class_to_idx(reference.info)), ""
    workers = min(4, _cores()) if args.workers is None else args.workers

    def features_of(dataset: Dataset, count: int = 0) -> Features:
        batches = image_batches(dataset, partial(photo_tensor, size=samples.size), count, args.batch_size, workers)
        return extract(batches, device=device, total=len(batches.dataset))

    if args.inception:
        extract = partial(extract_inception_features, weights=args.inception_weights)
        compare = partial(evaluate_inception, k=args.k or 3)
    else:
        model, name = _load_model(args.features)
        name = f"{name} at {samples.size[0]} x {samples.size[1]}"
        _check_statistics(reference.statistics, name, args.reference)
        labels, note = _known_labels(labels, model, reference.info)
        extract = partial(extract_features, model, name=name, precision=args.precision)
        compare = partial(evaluate_generation, k=args.k or 5, seed=args.seed, device=device)
    fake = features_of(samples)
    fake.labels = labels
    real = None
    if reference.images is not None:
        real = features_of(reference.images, args.images if args.dataset else 0)
    if args.save_statistics:
        real.statistics().to_npz(args.save_statistics)
    report = compare(fake, real, reference.statistics)
    if args.json:
        text = json.dumps(_results(args, report), indent=1)
        print(text) if args.json == "-" else Path(args.json).write_text(text + "\n", encoding="utf-8")
    _print_table(args, report, note)


def open_reference(args: argparse.Namespace) -> Reference:
    """The real images or statistics that the arguments name.

    Raises:
        CollapseError: No images of that name and split, or a file with neither images nor statistics.
    """
    from ..data import open_dataset
    from ..evaluation import FeatureStatistics
    from ..evaluation.feature_statistics import open_npz
    from ..evaluation.samples import read_arrays
    from ..order import CollapseError

    if args.dataset:
        info = open_dataset(args.dataset, args.split)
        return Reference(info.dataset, None, info)
    with open_npz(args.reference) as data:
        keys = set(data.files)
    if not keys & {"arr_0", "mu"}:
        raise CollapseError(f"--reference: {args.reference} must hold mu and sigma, or arr_0, got {sorted(keys)}")
    images = read_arrays(args.reference)
    statistics = FeatureStatistics.from_npz(args.reference) if "mu" in keys else None
    if args.features and images is not None and statistics is not None and not statistics.features:
        statistics = None  # ADM's reference batch: the statistics are Inception's
    if args.save_statistics and images is None:
        raise CollapseError("--save-statistics needs real images: --dataset, or a --reference with arr_0")
    return Reference(images, statistics, None)


def _class_to_idx(info: DatasetInfo | None) -> dict[str, int]:
    """Class names of the data set; empty where it has none."""
    return info.dataset.class_to_idx if info else {}


def _known_labels(labels: Tensor | None, model: nn.Module, info: DatasetInfo | None) -> tuple[Tensor | None, str]:
    """The labels where they are classes of the classifier, else None; and what there is to say about it."""
    if labels is None:
        return None, " No label accuracy: the samples' folders or arr_1 do not say which class was asked for."
    classes = model.num_classes
    if int(labels.max()) >= classes or (info and info.num_classes not in (0, classes)):
        return None, f" No label accuracy: the classifier's {classes} classes are not those of the images."
    return labels, ""


def _check_statistics(statistics: FeatureStatistics | None, name: str, path: str) -> None:
    from ..order import CollapseError

    if statistics is not None and statistics.features != name:
        raise CollapseError(
            f"--reference: {path} holds statistics of {statistics.features or 'an unnamed model'!r}, the samples' are "
            f"of {name!r}; files of other tools hold Inception's, for --inception"
        )


def _load_model(name: str) -> tuple[nn.Module, str]:
    """The feature model and its name, folders by their last two parts."""
    from ..evaluation.report import relative_paths
    from ..models.registry import load_model
    from ..order import CollapseError

    model = load_model(name, "--features")
    if not getattr(model, "num_classes", 0):
        raise CollapseError(f"--features: {name!r} is no classifier: it has 0 classes")
    return model, relative_paths(name.removeprefix("local-dir:"))


def _results(args: argparse.Namespace, report: GenerationReport | InceptionReport) -> dict[str, Any]:
    from ..evaluation.report import hardware, relative_paths

    source = {"dataset": relative_paths(args.dataset), "split": args.split} if args.dataset else {}
    reference = {"reference": relative_paths(args.reference)} if args.reference else {}
    return {
        "samples_from": relative_paths(args.samples),
        **source,
        **reference,
        **report.to_dict(),
        "hardware": hardware(),
    }


def _print_table(args: argparse.Namespace, report: GenerationReport | InceptionReport, note: str) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Column, Table

    values = report.to_dict()
    real = f"{report.references:,}" if report.references else "an unknown number of"
    network = "Inception (torch-fidelity)" if args.inception else report.features
    table = Table(
        Column("metric"),
        Column("value", justify="right"),
        Column("best"),
        caption=escape(f"{report.samples:,} samples, {real} real images, features of {network}, k = {report.k}.{note}"),
        caption_justify="left",
    )
    for key, (title, best) in ROWS.items():
        if values.get(key) is not None:
            title = "KID" if args.inception and key == "kid" else title
            spread = values.get(f"{key}_std")
            table.add_row(title, f"{values[key]:.4g}" + ("" if spread is None else f" ±{spread:.2g}"), best)
    Console(stderr=args.json == "-", highlight=False).print(table)


def _check_numbers(args: argparse.Namespace) -> None:
    """What would otherwise fail only after a long extraction."""
    from ..order import CollapseError

    for name, low in {"batch_size": 1, "images": 0, "workers": 0, "k": 1}.items():
        value = getattr(args, name)
        if value is not None and value < low:
            raise CollapseError(f"--{name.replace('_', '-')} must be at least {low}, got {value}")
    for path in (args.json, args.save_statistics):
        if path and path != "-" and not Path(path).parent.is_dir():
            raise CollapseError(f"path: the folder {str(Path(path).parent)!r} does not exist")
    if args.inception_weights and not args.inception:
        raise CollapseError("--inception-weights needs --inception")
