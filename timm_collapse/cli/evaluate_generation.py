"""`timm-collapse evaluate-generation`: generated images against real ones.

What is heavy is imported inside the functions, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from .common import (
    CLASSIFIERS,
    DATASETS,
    add_batches,
    add_device,
    add_precision,
    add_seed,
    check_numbers,
    check_outputs,
    console,
    load_classifier,
    open_device,
    worker_count,
    write_json,
)

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.utils.data import Dataset

    from ..data import DatasetInfo
    from ..evaluation import Features, FeatureStatistics, GenerationReport, InceptionReport

SCORE_PARTS = 10  # of the classifier score and the Inception score
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

SUMMARY = "generated images against real ones"
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
    add = parser.add_argument
    # fmt: off
    add("--samples", required=True, metavar="PATH",
        help="generated images of one size: a folder of png or jpg files, in subfolders named by class (or class "
        "number) if they were asked for, or an .npz file as ADM's: arr_0 (N, H, W, 3) uint8, labels arr_1 optional")
    network = parser.add_mutually_exclusive_group(required=True)
    network.add_argument("--features", metavar="MODEL", help=f"classifier: {CLASSIFIERS}")
    network.add_argument("--inception", nargs="?", const="", metavar="FILE",
        help="FID and its kin; needs torch-fidelity, whose file of weights may be named (default: its download, "
        "cached)")
    real = parser.add_mutually_exclusive_group(required=True)
    real.add_argument("--dataset", metavar="NAME",
        help=f"real images: {DATASETS}; they are resized and cropped to the size of the samples")
    real.add_argument("--reference", metavar="FILE",
        help="real images or their statistics: an .npz file of --save-statistics, or with arr_0 or, for --inception, "
        "mu and sigma, as ADM's")
    add("--split", default="validation", help="of --dataset (default: %(default)s)")
    add("--images", type=int, default=0, metavar="N",
        help="evenly spaced images of the split; 0 for all (default: %(default)s)")
    add("--k", type=int, metavar="N",
        help="neighbours of precision, recall, density and coverage (default: 5; 3 with --inception, as ADM)")
    add("--save-statistics", metavar="FILE", help="write the mean and covariance of the real images' features (.npz)")
    add_batches(parser)
    add_precision(parser)
    add_device(parser)
    add_seed(parser, "the random subsets of --features")
    add("--json", metavar="PATH", help="also write all numbers; - writes them to stdout, and all else to stderr")
    # fmt: on


def run(args: argparse.Namespace) -> None:
    """Extracts features of generated and real images, compares them and prints the table."""
    from ..data.images import photo_tensor
    from ..evaluation import (
        evaluate_generation,
        evaluate_inception,
        extract_features,
        extract_inception_features,
        image_batches,
    )
    from ..evaluation.report import relative_paths
    from ..evaluation.samples import open_samples

    inception = args.inception is not None
    k = (3 if inception else 5) if args.k is None else args.k
    check_numbers(args, {"batch_size": 1, "images": 0, "workers": 0, "k": 1})
    check_outputs(args, "json", "save_statistics", pictures=())
    device = open_device(args.device)
    samples = open_samples(args.samples)
    reference = open_reference(args)
    check_counts(args, len(samples), reference.images, k)
    labels, note = samples.classes(_class_to_idx(reference.info)), ""

    def features_of(dataset: Dataset, count: int = 0) -> Features:
        resized = partial(photo_tensor, size=samples.size)
        batches = image_batches(dataset, resized, count, args.batch_size, worker_count(args))
        return extract(batches, device=device, total=len(batches.dataset))

    if inception:
        extract = partial(extract_inception_features, weights=args.inception or None)
        compare = partial(evaluate_inception, k=k)
    else:
        model = load_classifier(args.features, "--features")
        name = f"{relative_paths(args.features.removeprefix('local-dir:'))} at {samples.size[0]} x {samples.size[1]}"
        _check_statistics(reference.statistics, name, args.reference)
        labels, note = _known_labels(labels, model, reference.info)
        extract = partial(extract_features, model, name=name, precision=args.precision)
        compare = partial(evaluate_generation, k=k, seed=args.seed, device=device)
    fake = features_of(samples)
    fake.labels = labels
    real = None
    if reference.images is not None:
        real = features_of(reference.images, args.images if args.dataset else 0)
    if args.save_statistics:
        real.statistics().to_npz(args.save_statistics)
    report = compare(fake, real, reference.statistics)
    write_json(args.json, _results(args, report))
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


def check_counts(args: argparse.Namespace, samples: int, real: Dataset | None, k: int) -> None:
    """Refuses sets that are too small to be measured, before anything is extracted.

    Raises:
        CollapseError: Fewer samples than parts of the score, or either set without k neighbours for each image.
    """
    from ..order import CollapseError

    needed = max(SCORE_PARTS, 0 if real is None else k + 1)
    if samples < needed:
        raise CollapseError(
            f"--samples: {args.samples} holds {samples} images, too few: needed are at least {needed}, for "
            f"{SCORE_PARTS} parts of the score, and for k = {k} neighbours of each where real images are given"
        )
    if real is None:
        return
    count = min(args.images or len(real), len(real)) if args.dataset else len(real)
    if count <= k:
        source = "--reference" if args.reference else "--images" if args.images else "--dataset"
        raise CollapseError(
            f"{source}: {count} real images are too few: needed are at least {k + 1}, for k = {k} neighbours of each"
        )


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
    from rich.markup import escape
    from rich.table import Column, Table

    values = report.to_dict()
    real = f"{report.references:,}" if report.references else "an unknown number of"
    inception = args.inception is not None
    network = "Inception (torch-fidelity)" if inception else report.features
    table = Table(
        Column("metric"),
        Column("value", justify="right"),
        Column("best"),
        caption=escape(f"{report.samples:,} samples, {real} real images, features of {network}, k = {report.k}.{note}"),
        caption_justify="left",
    )
    for key, (title, best) in ROWS.items():
        if values.get(key) is not None:
            title = "KID" if inception and key == "kid" else title
            spread = values.get(f"{key}_std")
            table.add_row(title, f"{values[key]:.4g}" + ("" if spread is None else f" ±{spread:.2g}"), best)
    console(args).print(table)
